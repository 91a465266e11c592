// The server: headers, types, what it refuses, and what it says when it cannot start.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { connect } from "node:net";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { pageServer } from "../serve.mjs";

const SERVE = fileURLToPath(new URL("../serve.mjs", import.meta.url));
let server, address;

before(async () => {
  server = pageServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  address = `http://127.0.0.1:${server.address().port}`;
});
after(() => {
  server.closeAllConnections();
  server.close();
});

/** The status line for a path that no client tidies up first. */
async function rawStatus(path, method = "GET") {
  const socket = connect(server.address().port, "127.0.0.1");
  socket.write(`${method} ${path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n`);
  let answer = "";
  for await (const part of socket) answer += part;
  return Number(answer.split(" ")[1]);
}

async function run(port) {
  const process_ = spawn(process.execPath, [SERVE], { env: { ...process.env, PORT: String(port) } });
  const out = { text: "", errors: "" };
  process_.stdout.on("data", (part) => (out.text += part));
  process_.stderr.on("data", (part) => (out.errors += part));
  return { process: process_, out };
}

test("headers isolate the page, and types are right", async () => {
  const types = {
    "/": "text/html; charset=utf-8",
    "/main.js": "text/javascript; charset=utf-8",
    "/style.css": "text/css; charset=utf-8",
    "/models/plain.onnx": "application/octet-stream",
    "/samples/00.png": "image/png",
  };
  for (const [path, type] of Object.entries(types)) {
    const response = await fetch(address + path);
    await response.arrayBuffer();
    assert.equal(response.status, 200, path);
    assert.equal(response.headers.get("content-type"), type, path);
    assert.equal(response.headers.get("cross-origin-opener-policy"), "same-origin");
    assert.equal(response.headers.get("cross-origin-embedder-policy"), "require-corp");
  }
  assert.equal(await rawStatus("/", "HEAD"), 200);
});

test("nothing else is served", async () => {
  const paths = [
    "/../README.md", "/..%2f..%2fREADME.md", "/%2e%2e/pyproject.toml", "/models/../../pyproject.toml", "//etc/passwd",
    "/..\\README.md", "/.gitignore", "/node_modules/playwright-core/package.json", "/models", "/nothing.js", "/%", "/a%00.js",
    "/node_modules/onnxruntime-web/dist/../package.json", "/make_models.py",
  ];
  for (const path of paths) assert.equal(await rawStatus(path), 404, path);
  assert.equal(await rawStatus("/", "POST"), 405);
});

test("a port that is taken gets one clear line", async () => {
  const { port } = server.address();
  const { process: second, out } = await run(port);
  const [code] = await once(second, "exit");
  assert.equal(code, 1);
  assert.match(out.errors, new RegExp(`^port ${port} is taken; choose another: make web PORT=\\d+\\n$`));
});

test("a port that is none gets one clear line", async () => {
  const { process: child, out } = await run("eighty");
  const [code] = await once(child, "exit");
  assert.equal(code, 1);
  assert.match(out.errors, /^PORT=eighty is no port; .*\n$/);
});

test("it prints its address, and Ctrl-C ends it quietly", async () => {
  const { process: child, out } = await run(0);
  while (!out.text.includes("\n")) await once(child.stdout, "data");
  assert.match(out.text, /http:\/\/localhost:\d+/);
  child.kill("SIGINT");
  const [code] = await once(child, "exit");
  assert.equal(code, 0);
  assert.equal(out.errors, "");
});
