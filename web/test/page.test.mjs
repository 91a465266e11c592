// What the page computes, in a real browser.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { open, settled } from "../browser.mjs";
import { SAME, best, difference, index, openBrowser, showSample, shown, text } from "./visit.mjs";

let visit, close;
before(async () => ({ visit, close } = await openBrowser()));
after(() => close?.());

function mirroredMap({ values, rows }) {
  const columns = values.length / rows;
  return values.map((_, i) => values[i - (i % columns) + columns - 1 - (i % columns)]);
}

test("both networks classify every sample as ONNX Runtime does, E(ViT) the same both ways", async (t) => {
  const { page, context, problems } = await visit();
  assert.ok(await page.evaluate(() => crossOriginIsolated));
  let [largest, largestMap, changes, far] = [0, 0, 0, 0];
  const times = { equivariant: [], plain: [] };
  for (const [i, sample] of index.samples.entries()) {
    const { results, milliseconds } = await showSample(page, i);
    const { equivariant, plain } = results;
    assert.equal(best(equivariant.answers[0]), best(equivariant.answers[1]), sample.file);
    largest = Math.max(largest, difference(...equivariant.answers));
    const [map, other] = equivariant.maps;
    largestMap = Math.max(largestMap, difference(mirroredMap(map), other.values) / Math.max(...map.values));
    changes += best(plain.answers[0]) !== best(plain.answers[1]);
    for (const name of ["equivariant", "plain"]) {
      times[name].push(milliseconds[name]);
      for (const view of [0, 1]) {
        far = Math.max(far, difference(results[name].answers[view], sample.probabilities[name][view]));
      }
    }
  }
  const median = (list) => list.sort((a, b) => a - b)[list.length >> 1].toFixed(2);
  t.diagnostic(`E(ViT): probabilities change by at most ${largest.toExponential(1)}, maps by ${largestMap.toExponential(1)}`);
  t.diagnostic(`plain changes its mind on ${changes} of ${index.samples.length} samples`);
  t.diagnostic(`largest difference to ONNX Runtime in Python: ${far.toExponential(1)}`);
  t.diagnostic(`milliseconds: E(ViT) ${median(times.equivariant)}, plain ${median(times.plain)}`);
  assert.ok(largest < SAME && largestMap < SAME && far < SAME);
  assert.ok(changes >= 1);
  assert.deepEqual(problems, []);
  await context.close();
});

test("what is shown is what was computed", async () => {
  const { page, context } = await visit();
  const { results } = await showSample(page, index.first);
  const order = results.plain.answers[1].map((_, i) => i).sort((a, b) => results.plain.answers[1][b] - results.plain.answers[1][a]);
  const rows = await page.locator("#card-plain .bars").nth(1).locator("li").allTextContents();
  assert.equal(rows.length, 5);
  for (const [i, row] of rows.entries()) {
    assert.ok(row.includes(`${(100 * results.plain.answers[1][order[i]]).toFixed(1)} %`), row);
  }
  assert.match(await text(page, "status"), /E\(ViT\) says .* both ways; Plain ViT says .*, mirrored /);
  assert.match(await page.locator("#card-plain .verdict").textContent(), /Changes its mind/);
  assert.match(await page.locator("#card-equivariant .verdict").textContent(), /The same both ways/);
  assert.match(await page.locator("#card-equivariant .cost").textContent(), /ms · .* multiply-adds · .* MB/);
  assert.equal(await page.locator("#summary tr").count(), 7);
  const mirrors = await page.evaluate(() => {
    const [a, b] = ["view-0", "view-1"].map((id) => document.getElementById(id));
    const [left, right] = [a, b].map((c) => c.getContext("2d").getImageData(0, 0, c.width, c.height).data);
    const wide = a.width;
    return left.every((value, i) => value === right[4 * ((Math.floor(i / 4 / wide) + 1) * wide - 1 - (Math.floor(i / 4) % wide)) + (i % 4)]);
  });
  assert.ok(mirrors, "the second view is the exact mirror image of the first");
  await page.locator("[name=map][value=equivariant]").check();
  assert.match(await text(page, "map-note"), /mirrors along with the picture/);
  await page.locator("[name=map][value=plain]").check();
  assert.match(await text(page, "map-note"), /does not mirror along/);
  await context.close();
});

test("a photograph on a bright ground is inverted, unless the user says otherwise", async () => {
  const { page, context, problems } = await visit();
  const png = await page.evaluate(async () => {
    const canvas = new OffscreenCanvas(300, 200);
    const draw = canvas.getContext("2d");
    draw.fillStyle = "white";
    draw.fillRect(0, 0, 300, 200);
    draw.fillStyle = "#246";
    draw.fillRect(100, 50, 100, 100);
    return [...new Uint8Array(await (await canvas.convertToBlob()).arrayBuffer())];
  });
  await page.setInputFiles("#file", { name: "photo.png", mimeType: "image/png", buffer: Buffer.from(png) });
  await page.waitForFunction(() => document.querySelector("#status").textContent.includes("photo.png"));
  assert.ok(await page.locator("#invert").isChecked());
  const corner = () => page.evaluate(async () => (await import("./main.js")).state.shown.views[0][0]);
  assert.equal(await corner(), 0);
  await page.locator("#invert").uncheck();
  await page.waitForFunction(async () => (await import("./main.js")).state.shown.views[0][0] === 255);
  assert.equal(await page.locator('.sample[aria-pressed="true"]').count(), 0);
  assert.deepEqual(problems, []);
  await context.close();
});

test("WebGPU computes the same where there is an adapter", async (t) => {
  const software = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan", "--use-vulkan=swiftshader"];
  const own = await open(software);
  try {
    const page = await own.browser.newPage();
    await page.goto(own.address);
    await settled(page);
    if (!(await page.evaluate(async () => Boolean(await navigator.gpu?.requestAdapter())))) return t.skip("no adapter");
    const before = await shown(page);
    await page.locator("#backend option[value=webgpu]:enabled").waitFor({ state: "attached" });
    await page.selectOption("#backend", "webgpu");
    await page.waitForFunction(() => document.querySelector("#status").textContent.includes("WebGPU"), null, { timeout: 60_000 });
    const { results } = await shown(page);
    const far = Math.max(...["equivariant", "plain"].map((name) => difference(results[name].answers[1], before.results[name].answers[1])));
    t.diagnostic(`largest difference to WebAssembly: ${far.toExponential(1)}`);
    assert.ok(far < 1e-3 && difference(...results.equivariant.answers) < SAME);
    assert.equal(await text(page, "error"), "");
  } finally {
    await own.close();
  }
});

test("WebGPU that does not work is left for WebAssembly, with a note", async () => {
  const { page, context, problems } = await visit({
    script: () => Object.defineProperty(navigator, "gpu", { value: { requestAdapter: async () => ({}) } }),
  });
  await page.locator("#backend option[value=webgpu]:enabled").waitFor({ state: "attached" });
  await page.selectOption("#backend", "webgpu");
  await page.waitForFunction(() => document.querySelector("#error").textContent);
  assert.match(await text(page, "error"), /^WebGPU does not work here, so WebAssembly goes on/);
  assert.equal(await page.locator("#backend").inputValue(), "wasm");
  await showSample(page, 1);
  assert.deepEqual(problems, []);
  await context.close();
});

test("once it is loaded, it works without a network", async () => {
  const { page, context, problems } = await visit();
  await context.setOffline(true);
  const { results } = await showSample(page, 2);
  assert.equal(best(results.equivariant.answers[0]), best(index.samples[2].probabilities.equivariant[0]));
  assert.deepEqual(problems, []);
  await context.close();
});

test("without the server's headers it runs in one thread, and says so", async () => {
  const bare = async (route) => {
    const { body, headers } = await route.fetch().then(async (r) => ({ body: await r.body(), headers: r.headers() }));
    delete headers["cross-origin-opener-policy"];
    delete headers["cross-origin-embedder-policy"];
    await route.fulfill({ body, headers });
  };
  const { page, context, problems } = await visit({ route: ["**/*", bare] });
  assert.equal(await page.evaluate(() => crossOriginIsolated), false);
  assert.match(await text(page, "status"), /WebAssembly, 1 thread \(more need the server’s headers/);
  assert.deepEqual(problems, []);
  await context.close();
});
