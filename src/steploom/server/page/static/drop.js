// Images that are dropped, pasted or chosen: one of ours brings its parameters back, any other is one to start from.

import { byId } from "./dom.js";
import { parametersOf } from "./png.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"];

/** Listens everywhere on the page; `take` gets the file. */
export function listen(take) {
  const veil = byId("drop");
  let inside = 0; // dragenter and dragleave come for every element on the way
  const files = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const veiled = (by) => { inside = Math.max(0, inside + by); veil.hidden = !inside; };
  addEventListener("dragenter", (event) => { if (files(event)) { event.preventDefault(); veiled(1); } });
  addEventListener("dragleave", (event) => { if (files(event)) veiled(-1); });
  addEventListener("dragover", (event) => { if (files(event)) event.preventDefault(); });
  addEventListener("drop", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    veiled(-inside);
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => KINDS.includes(one.type));
    if (file) take(file);
  });
  const chosen = byId("file");
  chosen.addEventListener("change", () => {
    if (chosen.files.length) take(chosen.files[0]);
    chosen.value = "";
  });
}

/** Puts a file to use in `form`: its parameters, or itself. */
export async function use(file, form) {
  if (!KINDS.includes(file.type)) {
    form.say(`${file.name} is no PNG, JPEG or WebP image.`, { wrong: true });
    return;
  }
  const found = await parametersOf(file);
  if (found) {
    form.useImage(null);
    form.restore(found);
    const act = form.info.image_parameters ? { text: "Start from the image instead", run: () => start(file, form) } : null;
    form.say(`The parameters of ${file.name} are back.`, { act });
  } else {
    start(file, form);
  }
}

/** Has the next requests start from an image. */
export function start(file, form) {
  if (!form.info.image_parameters && form.info.parameters.length) {
    form.say(`${form.info.pipeline_class} makes no images from images.`, { wrong: true });
    return;
  }
  form.useImage({ file, name: file.name, url: URL.createObjectURL(file) });
  form.say(null);
}

/** The middle of an image in the size that was asked for, so that nothing is stretched and no more is sent than needed. */
export async function fitted(file, width, height) {
  if (!width || !height) return file;
  const picture = await createImageBitmap(file);
  const scale = Math.max(width / picture.width, height / picture.height);
  const [wide, tall] = [picture.width * scale, picture.height * scale];
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const paper = canvas.getContext("2d");
  paper.imageSmoothingQuality = "high";
  paper.drawImage(picture, (width - wide) / 2, (height - tall) / 2, wide, tall);
  picture.close();
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
}
