// The page in a real browser: what it computes, what it says when something is wrong, and whether everybody can use it.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, before, test } from "node:test";
import { open, settled } from "../browser.mjs";

const SAME = 1e-4;
const index = JSON.parse(await readFile(new URL("../samples/index.json", import.meta.url)));
let browser, address, close;

before(async () => {
  const media = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"];
  ({ browser, address, close } = await open(media));
});
after(() => close?.());

/** A page with what its console and its errors say; `wait` until it shows a picture. */
async function visit({ wait = true, route = null, script = null, ...options } = {}) {
  const context = await browser.newContext(options);
  const page = await context.newPage();
  const problems = [];
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(String(error)));
  if (route) await page.route(...route);
  if (script) await page.addInitScript(script);
  await page.goto(address);
  if (wait) await settled(page);
  return { page, context, problems };
}

/** Choose a sample and wait for its answers. */
async function showSample(page, i) {
  await page.evaluate(async (place) => {
    const { state } = await import("./main.js");
    const before = state.shown;
    document.querySelectorAll(".sample")[place].click();
    while (state.shown === before || !state.shown.milliseconds) await new Promise((r) => setTimeout(r, 5));
  }, i);
  return shown(page);
}

const shown = (page) => page.evaluate(async () => {
  const { state } = await import("./main.js");
  const { results, milliseconds } = state.shown;
  const plain = {};
  for (const [name, { answers, maps }] of Object.entries(results)) {
    plain[name] = { answers, maps: maps.map(({ values, rows }) => ({ values: [...values], rows })) };
  }
  return { results: plain, milliseconds };
});

const best = (values) => values.indexOf(Math.max(...values));
const difference = (a, b) => Math.max(...a.map((value, i) => Math.abs(value - b[i])));
const text = (page, id) => page.locator(`#${id}`).textContent();

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

test("a dropped picture is taken", async () => {
  const { page, context } = await visit();
  await page.evaluate(async () => {
    const blob = await (await fetch("samples/03.png")).blob();
    const data = new DataTransfer();
    data.items.add(new File([blob], "dropped.png", { type: "image/png" }));
    document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
  });
  await page.waitForFunction(() => document.querySelector("#status").textContent.includes("dropped.png"));
  await context.close();
});

test("the camera: a picture is taken, and no permission gets a message", async () => {
  const { page, context, problems } = await visit();
  await page.locator("#open-camera").click();
  await page.waitForFunction(() => document.querySelector("#video").videoWidth > 0);
  assert.equal(await page.locator("#mirror-view").isChecked(), false);
  await page.locator("#take").click();
  await page.waitForFunction(() => document.querySelector("#status").textContent.includes("camera"));
  assert.ok(await page.locator("#camera").isHidden());
  for (const [name, words] of [["NotAllowedError", /may not use the camera/], ["NotFoundError", /no camera/]]) {
    await page.evaluate((kind) => {
      navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException("", kind));
    }, name);
    await page.locator("#open-camera").click();
    await page.waitForFunction(() => document.querySelector("#error").textContent);
    assert.match(await text(page, "error"), words);
  }
  assert.deepEqual(problems, []);
  await context.close();
});

test("a file that is no picture gets a message, and the page goes on", async () => {
  const { page, context, problems } = await visit();
  await page.setInputFiles("#file", { name: "broken.png", mimeType: "image/png", buffer: Buffer.from("no picture at all") });
  await page.waitForFunction(() => document.querySelector("#error").textContent);
  assert.match(await text(page, "error"), /“broken.png” is not a picture/);
  assert.equal(await page.locator("#error").getAttribute("aria-live"), "assertive");
  await showSample(page, 0);
  assert.equal(await text(page, "error"), "");
  assert.deepEqual(problems, []);
  await context.close();
});

test("damaged and missing models get a message that names the file and the remedy", async () => {
  const whole = await readFile(new URL("../models/plain.onnx", import.meta.url));
  const scrambled = Buffer.from(whole);
  scrambled.fill(0xff, 2000, 6000);
  const bodies = [whole.subarray(0, 500_000), Buffer.from("<!doctype html>"), scrambled, Buffer.alloc(0), null];
  for (const body of bodies) {
    const answer = (route) => route.fulfill(body ? { status: 200, body } : { status: 404, body: "" });
    const { page, context, problems } = await visit({ wait: false, route: ["**/models/plain.onnx", answer] });
    await page.waitForFunction(() => document.querySelector("#error").textContent);
    assert.match(await text(page, "error"), /^models\/plain\.onnx is (damaged|missing).*web\/make_models\.py/);
    assert.equal(await text(page, "status"), "The networks are not running.");
    assert.deepEqual(problems.filter((line) => !line.includes("404")), []);
    await context.close();
  }
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

test("everything can be reached and used with the keyboard, and the focus is seen", async () => {
  const { page, context } = await visit();
  await page.locator(".sample").first().focus();
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => document.querySelectorAll(".sample")[1].getAttribute("aria-pressed") === "true");
  await settled(page);
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineWidth);
  assert.equal(outline, "3px");
  const reached = [];
  for (let i = 0; i < 30; i += 1) {
    await page.keyboard.press("Tab");
    reached.push(await page.evaluate(() => document.activeElement.id || document.activeElement.name || ""));
  }
  for (const id of ["choose-file", "open-camera", "invert", "backend", "map"]) assert.ok(reached.includes(id), id);
  await page.locator("[name=map]").first().focus();
  await page.keyboard.press("ArrowDown");
  assert.match(await text(page, "map-note"), /mirrors along/);
  await context.close();
});

test("dark mode has other colours", async () => {
  const colours = [];
  for (const colorScheme of ["light", "dark"]) {
    const { page, context } = await visit({ colorScheme });
    colours.push(await page.evaluate(() => [getComputedStyle(document.documentElement).backgroundColor, getComputedStyle(document.body).color].join()));
    await context.close();
  }
  assert.notEqual(colours[0], colours[1]);
});

test("360 pixels are wide enough, and nothing jumps when another sample is chosen", async () => {
  const { page, context } = await visit({ viewport: { width: 360, height: 740 } });
  const size = () => page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight]);
  const heights = new Set();
  for (let i = 0; i < index.samples.length; i += 1) {
    await showSample(page, i);
    const [width, height] = await size();
    assert.ok(width <= 360, `${width} pixels`);
    heights.add(height);
  }
  assert.equal(heights.size, 1, [...heights].join());
  await context.close();
});

test("without motion where none is wanted", async () => {
  for (const [reducedMotion, duration] of [["reduce", "0s"], ["no-preference", "0.25s"]]) {
    const { page, context } = await visit({ reducedMotion });
    const bar = page.locator(".bar span").first();
    assert.equal(await bar.evaluate((node) => getComputedStyle(node).transitionDuration), duration);
    await context.close();
  }
});

test("once it is loaded, it works without a network", async () => {
  const { page, context, problems } = await visit();
  await context.setOffline(true);
  const { results } = await showSample(page, 2);
  assert.equal(best(results.equivariant.answers[0]), best(index.samples[2].probabilities.equivariant[0]));
  assert.deepEqual(problems, []);
  await context.close();
});
