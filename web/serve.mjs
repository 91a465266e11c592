// Serves this folder on localhost, with the headers without which a browser gives WebAssembly no threads.
import { createReadStream } from "node:fs";
import { realpath, stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, sep } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL(".", import.meta.url));
const HOST = "127.0.0.1";
const RUNTIME = "node_modules/onnxruntime-web/dist/";
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
  "X-Content-Type-Options": "nosniff",
  "Cache-Control": "no-cache",
};
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".json": "application/json",
  ".txt": "text/plain; charset=utf-8",
  ".png": "image/png",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
  ".onnx": "application/octet-stream",
};

/** The file that an address stands for, or null: nothing outside the folder, nothing hidden, no other packages. */
async function fileOf(address) {
  let path;
  try {
    path = decodeURIComponent(address.split(/[?#]/)[0]).replace(/^\/+/, "") || "index.html";
  } catch {
    return null;
  }
  const parts = path.split("/");
  if (path.includes("\\") || path.includes("\0") || parts.some((part) => part.startsWith("."))) return null;
  if (parts[0] === "node_modules" && !path.startsWith(RUNTIME)) return null;
  if (!(extname(path) in TYPES)) return null;
  try {
    const root = await realpath(ROOT);
    const file = await realpath(join(root, path));
    const inside = file.startsWith(root.endsWith(sep) ? root : root + sep);
    const about = await stat(file);
    return inside && about.isFile() ? { file, size: about.size } : null;
  } catch {
    return null;
  }
}

/** A server of the page; it listens to nothing yet. */
export function pageServer() {
  return createServer(async (request, response) => {
    const refuse = (status, text) => {
      response.writeHead(status, { ...HEADERS, "Content-Type": TYPES[".txt"] });
      response.end(`${text}\n`);
    };
    if (request.method !== "GET" && request.method !== "HEAD") return refuse(405, "only GET and HEAD");
    const found = await fileOf(request.url);
    if (!found) return refuse(404, "no such file");
    const type = TYPES[extname(found.file)];
    response.writeHead(200, { ...HEADERS, "Content-Type": type, "Content-Length": found.size });
    if (request.method === "HEAD") return response.end();
    createReadStream(found.file).on("error", () => response.destroy()).pipe(response);
  });
}

function fail(text) {
  console.error(text);
  process.exit(1);
}

function main() {
  const port = Number(process.env.PORT || 8080);
  if (!Number.isInteger(port) || port < 0 || port > 65535) {
    fail(`PORT=${process.env.PORT} is no port; give a number from 0 (any free one) to 65535`);
  }
  const server = pageServer();
  server.on("error", (error) => {
    if (error.code === "EADDRINUSE") fail(`port ${port} is taken; choose another: make web PORT=${port + 1}`);
    if (error.code === "EACCES") fail(`port ${port} is not for everyone; choose another: make web PORT=8080`);
    fail(`cannot serve: ${error.message}`);
  });
  server.listen(port, HOST, () => {
    console.log(`equiflop in the browser: http://localhost:${server.address().port}  (Ctrl-C ends it)`);
  });
  for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => process.exit(0));
}

if (process.argv[1] && (await realpath(process.argv[1])) === fileURLToPath(import.meta.url)) main();
