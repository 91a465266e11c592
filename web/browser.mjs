// The page in a browser without a window, for the test and the screenshot.
import { accessSync, constants } from "node:fs";
import { delimiter, join } from "node:path";
import { pageServer } from "./serve.mjs";

const NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];

/** The browser: what CHROMIUM names, or the first on PATH; null if there is none. */
export function chromium() {
  if (process.env.CHROMIUM) return process.env.CHROMIUM;
  for (const folder of (process.env.PATH ?? "").split(delimiter)) {
    for (const name of NAMES) {
      try {
        accessSync(join(folder, name), constants.X_OK);
        return join(folder, name);
      } catch {
        continue;
      }
    }
  }
  return null;
}

/** Serve the page on a free port and open a browser. */
export async function open(args = []) {
  const { chromium: playwright } = await import("playwright-core");
  const executablePath = chromium();
  if (!executablePath) throw new Error("no Chromium on PATH; name one in CHROMIUM");
  const server = pageServer();
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const browser = await playwright.launch({ executablePath, args: ["--no-sandbox", ...args] });
  const close = async () => {
    await browser.close();
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  };
  return { browser, address: `http://localhost:${server.address().port}/`, close };
}

/** Wait until a picture is shown whole, with its milliseconds. */
export async function settled(page) {
  await page.waitForFunction(() => /^Showing/.test(document.querySelector("#status").textContent), null, { timeout: 60_000 });
}
