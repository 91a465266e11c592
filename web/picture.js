// From a picture to what a network sees: a square, scaled, grey, perhaps inverted; and its exact mirror image.

const FINE = 16; // at most so many pixels of the picture, each way, are averaged to one of the network's

/** A file that is no picture; its message says so. */
export class PictureError extends Error {}

/** Read a picture's file. */
export async function decode(file) {
  try {
    return await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    const name = file.name ? `“${file.name}”` : "This";
    throw new PictureError(`${name} is not a picture that this browser can read. Try a PNG or JPEG file.`);
  }
}

/**
 * Pixels of the middle of a picture, one value of 0 to 255 per channel, in the network's order (channel, row, column).
 * A picture of the network's own size goes through unchanged.
 */
export function pixelsOf(source, { channels, height, width }) {
  const fullWidth = source.naturalWidth || source.videoWidth || source.width;
  const fullHeight = source.naturalHeight || source.videoHeight || source.height;
  const scale = Math.min(fullWidth / width, fullHeight / height);
  const fine = Math.max(1, Math.min(FINE, Math.floor(scale)));
  const canvas = new OffscreenCanvas(fine * width, fine * height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  const [cutWidth, cutHeight] = [scale * width, scale * height];
  const [left, top] = [(fullWidth - cutWidth) / 2, (fullHeight - cutHeight) / 2];
  context.drawImage(source, left, top, cutWidth, cutHeight, 0, 0, canvas.width, canvas.height);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const colours = [0, 1, 2].map((channel) => averaged(data, channel, fine, height, width));
  const pixels = channels === 3 ? colours.flat() : colours[0].map((_, i) => grey(colours.map((colour) => colour[i])));
  return Uint8ClampedArray.from(pixels, Math.round);
}

function averaged(data, channel, fine, height, width) {
  const sums = new Array(height * width).fill(0);
  for (let y = 0; y < fine * height; y += 1) {
    for (let x = 0; x < fine * width; x += 1) {
      const place = Math.floor(y / fine) * width + Math.floor(x / fine);
      sums[place] += data[4 * (y * fine * width + x) + channel];
    }
  }
  return sums.map((sum) => sum / fine ** 2);
}

/** Luma of ITU-R 601, as Pillow computes it. */
function grey([red, green, blue]) {
  return 0.299 * red + 0.587 * green + 0.114 * blue;
}

/** Whether the border is brighter than the middle: clothes on a bright ground, where the network knows a black one. */
export function hasBrightBorder(pixels, { height, width }) {
  const sums = { border: [0, 0], middle: [0, 0] };
  for (let i = 0; i < pixels.length; i += 1) {
    const [y, x] = [Math.floor(i / width) % height, i % width];
    const nearness = Math.min(x / width, y / height, (width - 1 - x) / width, (height - 1 - y) / height);
    const part = nearness < 0.1 ? sums.border : nearness >= 0.25 ? sums.middle : null;
    if (part) {
      part[0] += pixels[i];
      part[1] += 1;
    }
  }
  return sums.border[0] / sums.border[1] > sums.middle[0] / sums.middle[1];
}

/** Light for dark and dark for light. */
export function inverted(pixels) {
  return pixels.map((value) => 255 - value);
}

/** The network's input: every pixel normalised, in float32. */
export function tensorOf(pixels, { channels, mean, std }) {
  const size = pixels.length / channels;
  return Float32Array.from(pixels, (value, i) => {
    const channel = Math.floor(i / size);
    return Math.fround(Math.fround(value / 255) - Math.fround(mean[channel])) / Math.fround(std[channel]);
  });
}

/** The exact mirror image of rows of numbers: the same numbers in another order. */
export function mirrored(values, width) {
  return values.map((_, i) => values[i - (i % width) + (width - 1 - (i % width))]);
}
