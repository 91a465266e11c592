// The networks: fetched, opened in ONNX Runtime, run one at a time, and timed.
import { describe } from "./metadata.js";

const RUNTIME = new URL("node_modules/onnxruntime-web/dist/", import.meta.url).href;
const BUNDLES = { wasm: "ort.wasm.min.mjs", webgpu: "ort.webgpu.min.mjs" };
const MOST_THREADS = 4;
const RUNS = 25;
const LONGEST_MS = 800;
const REST_MS = 300;

/** Something that the reader of the page can mend; its message says how. */
export class ModelError extends Error {}

/** How many threads WebAssembly gets: more than one only where the page is isolated from other origins. */
export const threads = globalThis.crossOriginIsolated
  ? Math.max(1, Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1))
  : 1;

/** Fetch a model's file. Throws a ModelError that names it and says what to do. */
export async function fetchModel(name) {
  const path = `models/${name}.onnx`;
  const remedy = `Put it back with "git checkout web/models", or make it anew with web/make_models.py.`;
  let bytes;
  try {
    const response = await fetch(new URL(path, import.meta.url));
    if (!response.ok) throw new ModelError(`${path} is missing (HTTP ${response.status}). ${remedy}`);
    bytes = new Uint8Array(await response.arrayBuffer());
  } catch (error) {
    if (error instanceof ModelError) throw error;
    throw new ModelError(`${path} could not be fetched: is the server still running? Then load the page again.`);
  }
  try {
    return { name, path, bytes, remedy, sha256: await sha256Of(bytes), about: describe(bytes) };
  } catch (error) {
    throw new ModelError(`${path} is damaged: ${error.message}. ${remedy}`);
  }
}

async function sha256Of(bytes) {
  if (!globalThis.crypto?.subtle) return null; // a page that is neither on localhost nor behind https
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Whether this browser gives WebGPU an adapter. */
export async function hasWebgpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

/** ONNX Runtime for a backend, "wasm" or "webgpu". */
export async function openRuntime(backend) {
  let ort;
  try {
    ort = await import(RUNTIME + BUNDLES[backend]);
  } catch {
    throw new ModelError(`ONNX Runtime could not be loaded. Fetch it with "npm ci" in web/, then load the page again.`);
  }
  ort.env.wasm.wasmPaths = RUNTIME;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "fatal";
  return { ort, backend };
}

let turn = Promise.resolve();

/** Let one run follow the other: the runtime takes no two at once. */
function inTurn(work) {
  const result = turn.then(work);
  turn = result.catch(() => {});
  return result;
}

/** A network that is ready to run. */
export class Network {
  static async open(file, { ort, backend }) {
    const options = { executionProviders: [backend], graphOptimizationLevel: "all", logSeverityLevel: 4 };
    try {
      const network = new Network(file, ort, await inTurn(() => ort.InferenceSession.create(file.bytes, options)));
      const { channels, height, width } = file.about;
      await network.run(new Float32Array(channels * height * width)); // what cannot run is to fail here
      return network;
    } catch (error) {
      const reason = String(error.message ?? error).split("\n")[0];
      if (backend !== "wasm") throw new Error(reason);
      if (reason.includes("no available backend")) {
        throw new ModelError(`ONNX Runtime could not start WebAssembly here (${reason}). Try a newer browser, or "npm ci" in web/.`);
      }
      throw new ModelError(`${file.path} is damaged: ONNX Runtime cannot open it (${reason}). ${file.remedy}`);
    }
  }

  constructor(file, ort, session) {
    Object.assign(this, { name: file.name, about: file.about, bytes: file.bytes.length, ort, session });
  }

  /** A picture's tensor to { probabilities, map }; the map is null where the file has none. */
  async run(tensor) {
    const { channels, height, width } = this.about;
    const images = new this.ort.Tensor("float32", tensor, [1, channels, height, width]);
    const [input] = this.session.inputNames;
    const [answer] = this.session.outputNames;
    const outputs = await inTurn(() => this.session.run({ [input]: images }));
    const map = outputs.map && { values: Float32Array.from(outputs.map.data), rows: outputs.map.dims[1] };
    return { probabilities: softmax(outputs[answer].data), map: map ?? null };
  }

  release() {
    return inTurn(() => this.session.release());
  }
}

/**
 * Milliseconds of one picture for every network: the median of some runs, after the page has come to rest. They take
 * turns, and turns in going first, since the browser paints whenever one has finished.
 */
export async function time(networks, tensor) {
  await new Promise((resolve) => setTimeout(resolve, REST_MS));
  const times = networks.map(() => []);
  const start = performance.now();
  const order = [...networks.keys()];
  for (let i = 0; i < RUNS && performance.now() - start < LONGEST_MS; i += 1) {
    for (const j of order) {
      const before = performance.now();
      await networks[j].run(tensor);
      times[j].push(performance.now() - before);
    }
    order.reverse();
  }
  return times.map((list) => list.sort((a, b) => a - b)[list.length >> 1]);
}

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((value) => value / sum);
}

/** The largest difference between two lists of numbers. */
export function largestDifference(a, b) {
  return a.reduce((largest, value, i) => Math.max(largest, Math.abs(value - b[i])), 0);
}

/** The place of the largest number. */
export function best(values) {
  return values.reduce((place, value, i) => (value > values[place] ? i : place), 0);
}
