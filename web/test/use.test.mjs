// Whether everybody can use the page, and what it says when something is wrong.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { after, before, test } from "node:test";
import { settled } from "../browser.mjs";
import { index, openBrowser, showSample, text } from "./visit.mjs";

let visit, close;
before(async () => ({ visit, close } = await openBrowser()));
after(() => close?.());

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
