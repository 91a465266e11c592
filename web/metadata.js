// What stands in an ONNX file beside the graph: names, classes, normalisation. Nothing else of it is read here.

const GRAPH = 7;
const METADATA = 14;
const KEY = 1;
const VALUE = 2;

/** Fields of a protocol buffer's message: [number, bytes] for texts and messages; numbers are passed over. */
function* fields(bytes) {
  let at = 0;
  const number = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = bytes[at++];
      if (byte === undefined || scale > 2 ** 63) throw new Error("it ends in the middle");
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = number();
    const kind = tag % 8;
    if (kind === 0) {
      number();
      continue;
    }
    const length = { 1: 8, 2: -1, 5: 4 }[kind];
    if (length === undefined) throw new Error("it is no ONNX file");
    const size = length < 0 ? number() : length;
    if (at + size > bytes.length) throw new Error("it ends in the middle");
    if (kind === 2) yield [Math.floor(tag / 8), bytes.subarray(at, at + size)];
    at += size;
  }
}

/** The texts in metadata_props by key. Throws an Error if the bytes are no whole ONNX file. */
export function metadataOf(bytes) {
  const found = {};
  const text = new TextDecoder();
  let hasGraph = false;
  for (const [number, content] of fields(bytes)) {
    hasGraph ||= number === GRAPH;
    if (number !== METADATA) continue;
    const entry = Object.fromEntries(fields(content));
    found[text.decode(entry[KEY])] = text.decode(entry[VALUE]);
  }
  if (!hasGraph) throw new Error("it is no ONNX file");
  return found;
}

/** What the page needs to know of a network. Throws an Error if the file does not say it. */
export function describe(bytes) {
  const noted = metadataOf(bytes);
  const [size, mean, std, labels] = ["input_size", "mean", "std", "labels"].map((key) => {
    if (!noted[key]) throw new Error(`it does not say its ${key}, which files of "equiflop export" do`);
    return JSON.parse(noted[key]);
  });
  if (size[0] !== 1 && size[0] !== 3) throw new Error(`it takes ${size[0]} channels, and pictures have 1 or 3`);
  return {
    model: noted.model,
    group: noted.group ?? "",
    channels: size[0],
    height: size[1],
    width: size[2],
    mean,
    std,
    labels,
    macs: Number(noted.macs) || null,
    parameters: Number(noted.parameters) || null,
  };
}
