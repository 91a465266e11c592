// Brings the page to life: a picture is chosen, both networks see both views, and the page tells what they say.
import { connectCamera } from "./camera.js";
import { ModelError, Network, fetchModel, hasWebgpu, openRuntime, threads, time } from "./network.js";
import { PictureError, decode, hasBrightBorder, inverted, mirrored, pixelsOf, tensorOf } from "./picture.js";
import * as view from "./view.js";

const { element } = view;

/** What the page shows at the moment. */
export const state = { backend: "wasm", networks: [], files: [], shown: null };

let chosen = null; // { source, title, isSample, inverted }
let latest = 0;

start().catch(report);

async function start() {
  state.files = await Promise.all(["equivariant", "plain"].map(fetchModel));
  const { about } = state.files[0];
  for (const { path, about: other } of state.files) {
    if (String([other.channels, other.height, other.width, other.labels]) !==
        String([about.channels, about.height, about.width, about.labels])) {
      throw new ModelError(`${path} takes other pictures or knows other classes than ${state.files[0].path}.`);
    }
  }
  view.sizeViews(about);
  element("classes").textContent = about.labels.join(", ").replaceAll("-", "‑"); // hyphens that do not break
  state.files.forEach(({ name }) => view.addCard(name, about.labels));
  view.showSummary(await json("models/about.json"), state.files);
  view.showMapNote("", null);
  await openNetworks("wasm");
  connect();
  await addSamples();
  await offerWebgpu();
}

async function json(path) {
  try {
    return await (await fetch(path)).json();
  } catch {
    return null;
  }
}

/** Open both networks on a backend; the old ones stay until the new ones are there. */
async function openNetworks(backend) {
  const runtime = await openRuntime(backend);
  const networks = [];
  for (const file of state.files) networks.push(await Network.open(file, runtime));
  const old = state.networks;
  Object.assign(state, { networks, backend });
  networks.forEach((network) => view.showCost(network, null));
  await Promise.all(old.map((network) => network.release()));
}

async function addSamples() {
  const index = await json("samples/index.json");
  if (!index) return view.complain("samples/index.json is missing; choose a file instead.");
  element("rule").textContent = index.rule;
  const made = index.samples.map((sample) => {
    const button = document.createElement("button");
    const picture = new Image(56, 56);
    Object.assign(button, { type: "button", className: "sample", title: sample.class });
    Object.assign(picture, { src: `samples/${sample.file}`, alt: sample.alt });
    button.setAttribute("aria-pressed", "false");
    button.append(picture);
    button.addEventListener("click", () => {
      const title = `test image ${sample.test_image}`;
      choose({ source: picture, title, label: sample.class, isSample: true }, button);
    });
    element("samples").append(button);
    return { button, picture };
  });
  await Promise.allSettled(made.map(({ picture }) => picture.decode()));
  made[index.first ?? 0]?.button.click();
}

function connect() {
  connectCamera((source) => choose({ source, title: "picture from the camera" }), view.complain);
  element("choose-file").addEventListener("click", () => element("file").click());
  element("file").addEventListener("change", (event) => {
    take(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  element("invert").addEventListener("change", (event) => {
    if (chosen) choose({ ...chosen, inverted: event.target.checked }, pressed());
  });
  element("backend").addEventListener("change", (event) => changeBackend(event.target.value).catch(report));
  for (const radio of document.querySelectorAll("[name=map]")) radio.addEventListener("change", showMaps);
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  for (const kind of ["dragleave", "drop"]) {
    document.addEventListener(kind, () => document.body.classList.remove("dropping"));
  }
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
}

async function take(file) {
  if (!file) return;
  try {
    await choose({ source: await decode(file), title: file.name });
  } catch (error) {
    report(error);
  }
}

const pressed = () => document.querySelector('.sample[aria-pressed="true"]');

/** Show a picture, and let both networks see both views. Samples are as the networks know them. */
async function choose(picture, button = null) {
  chosen = picture;
  const mine = (latest += 1);
  for (const other of document.querySelectorAll(".sample")) other.setAttribute("aria-pressed", String(other === button));
  try {
    await look(picture, () => mine === latest);
  } catch (error) {
    report(error);
  }
}

async function look(picture, isCurrent) {
  const { about } = state.networks[0];
  const asItIs = pixelsOf(picture.source, about);
  const invert = picture.inverted ?? (!picture.isSample && hasBrightBorder(asItIs, about));
  element("invert").checked = invert;
  const pixels = invert ? inverted(asItIs) : asItIs;
  const results = {};
  for (const network of state.networks) {
    const tensor = tensorOf(pixels, network.about);
    const views = [await network.run(tensor), await network.run(mirrored(tensor, about.width))];
    const maps = views.every(({ map }) => map) ? views.map(({ map }) => map) : null;
    results[network.name] = { answers: views.map(({ probabilities }) => probabilities), maps };
  }
  if (!isCurrent()) return;
  state.shown = { title: picture.title, views: [pixels, mirrored(pixels, about.width)], results, milliseconds: null };
  for (const network of state.networks) view.showAnswers(network.name, results[network.name], about.labels);
  view.showLabel(picture.label);
  showMaps();
  const { networks } = state;
  const milliseconds = await time(networks, tensorOf(pixels, about));
  if (!isCurrent()) return;
  networks.forEach((network, i) => view.showCost(network, milliseconds[i]));
  state.shown.milliseconds = Object.fromEntries(networks.map(({ name }, i) => [name, milliseconds[i]]));
  view.say(`Showing ${picture.title}. ${where()}`, view.inWords(results, about.labels));
}

function where() {
  if (state.backend === "webgpu") return "Computed with WebGPU.";
  const few = globalThis.crossOriginIsolated ? "" : " (more need the server’s headers, see docs/web.md)";
  return `Computed with WebAssembly, ${threads} ${threads === 1 ? "thread" : "threads"}${few}.`;
}

function showMaps() {
  if (!state.shown) return;
  const name = document.querySelector("[name=map]:checked").value;
  const maps = name ? state.shown.results[name].maps : null;
  view.showViews(state.shown.views, state.networks[0].about, maps);
  view.showMapNote(name, maps);
}

async function offerWebgpu() {
  if (!(await hasWebgpu())) return;
  const option = element("backend").querySelector("[value=webgpu]");
  Object.assign(option, { disabled: false, textContent: "WebGPU" });
}

async function changeBackend(backend) {
  view.say(`Opening the networks …`);
  try {
    await openNetworks(backend);
  } catch (error) {
    element("backend").value = state.backend;
    if (chosen) await choose(chosen, pressed());
    return view.complain(`WebGPU does not work here, so WebAssembly goes on: ${error.message}`);
  }
  if (chosen) await choose(chosen, pressed());
}

/** Tell what is wrong. What only a bug can cause goes to the console as well. */
function report(error) {
  const expected = error instanceof ModelError || error instanceof PictureError;
  if (!expected) console.error(error);
  if (!state.networks.length) element("status").textContent = "The networks are not running.";
  view.complain(expected ? error.message : `Something went wrong: ${error.message ?? error}`);
}
