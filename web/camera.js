// The camera: opened when it is asked for, closed as soon as a picture is taken.
import { element } from "./view.js";

const REASONS = {
  NotAllowedError: "This page may not use the camera. Allow it in the browser’s settings for this page, or choose a file.",
  NotFoundError: "There is no camera here. Choose a file instead.",
  NotReadableError: "The camera is in use by another program. Close that, or choose a file.",
};

let stream = null;
let isAsking = false;

function close() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  element("video").srcObject = null;
  element("camera").hidden = true;
  element("open-camera").setAttribute("aria-expanded", "false");
}

async function open(complain) {
  if (isAsking) return;
  isAsking = true;
  try {
    if (!navigator.mediaDevices) throw new DOMException("no camera", "NotFoundError");
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    return complain(REASONS[error.name] ?? `The camera could not be opened (${error.name}). Choose a file instead.`);
  } finally {
    isAsking = false;
  }
  const video = element("video");
  video.srcObject = stream;
  element("camera").hidden = false;
  element("open-camera").setAttribute("aria-expanded", "true");
  element("take").focus();
  await video.play().catch(() => {}); // closed in the meantime
}

/** Let the camera's buttons work; a picture that is taken goes to `taken` as a bitmap. */
export function connectCamera(taken, complain) {
  element("open-camera").addEventListener("click", () => (stream ? close() : open(complain)));
  element("close-camera").addEventListener("click", () => {
    close();
    element("open-camera").focus();
  });
  element("mirror-view").addEventListener("change", (event) => {
    element("video").classList.toggle("mirrored", event.target.checked);
  });
  element("take").addEventListener("click", async () => {
    const video = element("video");
    if (!video.videoWidth) return complain("The camera has not started yet. Try again in a moment.");
    const picture = await createImageBitmap(video);
    close();
    element("open-camera").focus();
    taken(picture);
  });
}
