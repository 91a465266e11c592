// What stands on the page: pictures, maps, bars, verdicts, the table.
import { best, largestDifference } from "./network.js";
import { mirrored } from "./picture.js";

const SHOWN = 5;
const ENLARGED = 10; // pixels of the canvas for one of the network
const NAMES = { equivariant: "E(ViT)", plain: "Plain ViT" };
const STRONGEST = 0.7;

export const element = (id) => document.getElementById(id);

/** A probability as a percentage. */
const percent = (value) => `${(100 * value).toFixed(1)} %`;

const millions = (value) => `${(value / 1e6).toFixed(value < 1e6 ? 2 : 1)} M`;
const megabytes = (value) => `${(value / 1e6).toFixed(2)} MB`;

/** A small number in powers of ten, a larger one in plain digits. */
function amount(value) {
  if (value === 0) return "0";
  if (value >= 0.001) return value.toFixed(3);
  const power = Math.floor(Math.log10(value));
  const digits = String(Math.abs(power)).replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);
  return `${(value / 10 ** power).toFixed(1)}\u00a0×\u00a010⁻${digits}`;
}

/** Make the card of a network; its bars are there from the start, so that nothing jumps. */
export function addCard(name, classes) {
  const card = element("card").content.cloneNode(true).querySelector("article");
  card.id = `card-${name}`;
  card.classList.add(name);
  card.querySelector("h3").textContent = NAMES[name];
  for (const list of card.querySelectorAll(".bars")) {
    for (let i = 0; i < Math.min(SHOWN, classes.length); i += 1) {
      const row = document.createElement("li");
      row.innerHTML = '<span class="name">–</span><span class="value"></span><span class="bar"><span></span></span>';
      list.append(row);
    }
  }
  element("cards").append(card);
}

/** Show what a network says of both views: { answers: [two lists of probabilities] }. */
export function showAnswers(name, { answers }, classes) {
  const card = element(`card-${name}`);
  card.querySelectorAll(".bars").forEach((list, view) => {
    const order = answers[view].map((_, i) => i).sort((a, b) => answers[view][b] - answers[view][a]);
    list.querySelectorAll("li").forEach((row, i) => {
      const value = answers[view][order[i]];
      const name = row.querySelector(".name");
      name.textContent = name.title = classes[order[i]]; // a long one may be cut short
      row.querySelector(".value").textContent = percent(value);
      row.querySelector(".bar span").style.width = `${100 * value}%`;
    });
  });
  const [here, there] = answers.map(best);
  const change = largestDifference(...answers);
  const verdict = card.querySelector(".verdict");
  verdict.dataset.same = here === there;
  const strong = document.createElement("strong");
  strong.textContent = here === there ? "= The same both ways" : "≠ Changes its mind";
  const what = here === there ? classes[here] : `${classes[here]}, mirrored ${classes[there]}`;
  verdict.replaceChildren(strong, `: ${what}`);
  card.querySelector(".change").textContent = `Largest change of probability: ${amount(change)}`;
}

/** Show what a network costs; the milliseconds are null until they are measured. */
export function showCost(network, milliseconds) {
  const { macs } = network.about;
  const parts = [
    milliseconds === null ? "… ms" : `${milliseconds.toFixed(milliseconds < 10 ? 2 : 0)} ms`,
    macs ? `${millions(macs)} multiply-adds` : "",
    megabytes(network.bytes),
  ];
  element(`card-${network.name}`).querySelector(".cost").textContent = parts.filter(Boolean).join(" · ");
}

/** Give the canvases their size before there is a picture. */
export function sizeViews({ height, width }) {
  for (const canvas of [element("view-0"), element("view-1")]) {
    [canvas.width, canvas.height] = [ENLARGED * width, ENLARGED * height];
    canvas.style.aspectRatio = `${width} / ${height}`;
  }
}

/** Say what the picture is, where that is known. */
export function showLabel(label) {
  element("label").textContent = label ? ` labelled “${label}”` : "";
}

/** Draw both views, and over them two maps, if they are given. */
export function showViews(views, { channels, height, width }, maps) {
  const values = maps?.flatMap((map) => Array.from(map.values));
  const [least, most] = values ? [Math.min(...values), Math.max(...values)] : [0, 1];
  views.forEach((pixels, view) => {
    const canvas = element(`view-${view}`);
    const context = canvas.getContext("2d");
    const small = new OffscreenCanvas(width, height);
    small.getContext("2d").putImageData(imageOf(pixels, channels, height, width), 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    const map = maps?.[view];
    if (!map) return;
    const columns = map.values.length / map.rows;
    const [cellWidth, cellHeight] = [canvas.width / columns, canvas.height / map.rows];
    map.values.forEach((value, i) => {
      const strength = STRONGEST * ((value - least) / (most - least || 1));
      const [x, y] = [(i % columns) * cellWidth, Math.floor(i / columns) * cellHeight];
      context.fillStyle = `rgb(66 214 160 / ${strength})`;
      context.fillRect(x, y, cellWidth, cellHeight);
      context.strokeStyle = "rgb(66 214 160 / 0.4)";
      context.strokeRect(x + 0.5, y + 0.5, cellWidth - 1, cellHeight - 1);
    });
  });
}

function imageOf(pixels, channels, height, width) {
  const image = new ImageData(width, height);
  const size = height * width;
  for (let i = 0; i < size; i += 1) {
    for (let c = 0; c < 3; c += 1) image.data[4 * i + c] = pixels[channels === 3 ? c * size + i : i];
    image.data[4 * i + 3] = 255;
  }
  return image;
}

/** The largest difference between the mirror image's map and the mirrored map, relative to the largest value. */
export function mapDifference([here, there]) {
  const moved = mirrored(here.values, here.values.length / here.rows);
  return largestDifference(moved, there.values) / Math.max(...here.values, ...there.values);
}

/** Say in words what the map is, and how far it mirrors. */
export function showMapNote(name, maps) {
  if (!maps) {
    element("map-note").textContent = name
      ? "This file has no map; web/make_models.py writes files that have one."
      : "A map shows how large the features of each token are after the last block: the more, the more it weighs.";
    return;
  }
  const difference = mapDifference(maps);
  const exact = difference < 1e-4 ? "mirrors along with the picture" : "does not mirror along with the picture";
  element("map-note").textContent =
    `Greener where the features of a token are larger. ${NAMES[name]}: ${exact}; the mirror image’s map differs from the mirrored map by at most ` +
    `${amount(difference)} of the largest value.`;
}

/** The figures of about.json; a note in their place if they are not of these files. */
export function showSummary(figures, files) {
  const note = element("summary-note");
  const fits = figures && files.every((file) => !file.sha256 || figures.networks[file.name]?.sha256 === file.sha256);
  if (!fits) {
    note.textContent = "models/about.json does not describe these two files, so there are no figures to show.";
    element("summary").hidden = true;
    return;
  }
  note.textContent =
    `Measured with these two files on the ${figures.test_images.toLocaleString("en")} test images of ` +
    `${figures.data}, and on their mirror images. One training of ${figures.training.epochs} epochs, seed ` +
    `${figures.training.seed}: accuracies differ by some tenths of a point between seeds.`;
  const rows = [
    ["Accuracy", (found) => `${(100 * found.accuracy).toFixed(2)} %`],
    ["Accuracy on mirror images", (found) => `${(100 * found.accuracy_mirrored).toFixed(2)} %`],
    ["Answers that change when mirrored", (found) => found.changed.toLocaleString("en")],
    ["Multiply-adds", (found) => millions(found.macs)],
    ["Parameters", (found) => millions(found.parameters)],
    ["File", (found) => megabytes(found.bytes)],
  ];
  const line = (tag, scope, title, cells) => {
    const row = document.createElement("tr");
    row.append(...[title, ...cells].map((text, i) => {
      const cell = document.createElement(i ? tag : "th");
      if (cell.tagName === "TH") cell.scope = i ? "col" : scope;
      cell.textContent = text;
      return cell;
    }));
    return row;
  };
  const found = files.map(({ name }) => figures.networks[name]);
  element("summary").replaceChildren(
    line("th", "col", "", files.map(({ name }) => NAMES[name])),
    ...rows.map(([title, cell]) => line("td", "row", title, found.map(cell))),
  );
}

/** What the networks say, in a sentence for those who do not see the bars. */
export function inWords(results, classes) {
  const said = Object.entries(results).map(([name, { answers }]) => {
    const [here, there] = answers.map((probabilities) => classes[best(probabilities)]);
    return `${NAMES[name]} says ${here}${here === there ? " both ways" : `, mirrored ${there}`}`;
  });
  return ` ${said.join("; ")}.`;
}

/** Say how things stand, and more to those who hear the page; what was wrong before is forgotten. */
export function say(text, spoken = "") {
  element("error").textContent = "";
  const unseen = document.createElement("span");
  Object.assign(unseen, { className: "unseen", textContent: spoken });
  element("status").replaceChildren(text, unseen);
}

/** Say what went wrong. */
export function complain(text) {
  element("error").textContent = text;
}
