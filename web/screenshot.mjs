// Takes the picture of the page for the documentation: npm run screenshot [FILE [WIDTH [dark]]]
import { fileURLToPath } from "node:url";
import { open, settled } from "./browser.mjs";

const [file = fileURLToPath(new URL("../docs/web.png", import.meta.url)), width = "1200", scheme = "light"] =
  process.argv.slice(2);
const { browser, address, close } = await open();
const page = await browser.newPage({ viewport: { width: Number(width), height: 800 }, colorScheme: scheme });
await page.goto(address);
await settled(page);
await page.waitForTimeout(3000); // until the browser has compiled WebAssembly, times are not what they will be
await page.locator('.sample[aria-pressed="true"]').click();
await page.locator("[name=map][value=equivariant]").check();
await page.waitForTimeout(2000); // bars at rest, times measured
await page.screenshot({ path: file, fullPage: true });
await close();
console.log(file);
