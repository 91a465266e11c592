// What the tests of the page share: a visit, a sample, and what is shown.
import { readFile } from "node:fs/promises";
import { open, settled } from "../browser.mjs";

export const SAME = 1e-4;
export const index = JSON.parse(await readFile(new URL("../samples/index.json", import.meta.url)));

/** Open a browser with a camera that is none; returns { visit, close }. */
export async function openBrowser() {
  const media = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"];
  const { browser, address, close } = await open(media);

  /** A page, and what its console and its errors say; with `wait` it shows a picture already. */
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
  return { visit, close };
}

/** Choose a sample and wait for its answers. */
export async function showSample(page, i) {
  await page.evaluate(async (place) => {
    const { state } = await import("./main.js");
    const before = state.shown;
    document.querySelectorAll(".sample")[place].click();
    while (state.shown === before || !state.shown.milliseconds) await new Promise((r) => setTimeout(r, 5));
  }, i);
  return shown(page);
}

/** What the page shows, as plain values. */
export function shown(page) {
  return page.evaluate(async () => {
    const { state } = await import("./main.js");
    const { results, milliseconds } = state.shown;
    const plain = {};
    for (const [name, { answers, maps }] of Object.entries(results)) {
      plain[name] = { answers, maps: maps.map(({ values, rows }) => ({ values: [...values], rows })) };
    }
    return { results: plain, milliseconds };
  });
}

export const best = (values) => values.indexOf(Math.max(...values));
export const difference = (a, b) => Math.max(...a.map((value, i) => Math.abs(value - b[i])));
export const text = (page, id) => page.locator(`#${id}`).textContent();
