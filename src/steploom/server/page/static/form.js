// What one asks for. Only the fields that the model takes are shown.

import { byId, el } from "./dom.js";

const ROUTES = { videos: "/v1/videos", text: "/v1/chat/completions" };
const NUMBERS = ["num_inference_steps", "guidance_scale", "true_cfg_scale"];

export class Form {
  image = null; // {file, name, url}: what to start from
  info = null;
  #form = byId("ask"); #fields = byId("ask").elements; #note = byId("note");

  constructor(submit) {
    this.#form.addEventListener("submit", (event) => { event.preventDefault(); submit(); });
    this.#form.addEventListener("input", (event) => event.target.removeAttribute("aria-invalid"));
    this.#fields.strength.addEventListener("input", () => this.#strength());
    byId("swap").addEventListener("click", () => this.#swap());
    byId("chip-remove").addEventListener("click", () => this.useImage(null));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) {
        event.preventDefault();
        this.#form.requestSubmit();
      }
    });
    if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("keys").textContent = "⌘ ⏎";
  }

  /** Fits the form to the model. */
  learn(info) {
    this.info = info;
    const fields = this.#fields;
    const [width, height] = info.default_size ?? [];
    for (const [name, own] of [["width", width], ["height", height]]) {
      Object.assign(fields[name], { min: info.size_multiple, step: info.size_multiple, placeholder: own ?? "auto" });
      if (info.size_most) fields[name].max = info.size_most;
    }
    Object.assign(fields.num_inference_steps, { max: info.max_steps, placeholder: info.default_steps ?? "auto" });
    for (const [name, value] of Object.entries(info.suggested)) if (!fields[name].value) fields[name].value = value;
    fields.model.replaceChildren(...info.models.map((name) => el("option", { value: name, textContent: name })));
    byId("models").hidden = info.models.length < 2;
    this.#examples(info.examples);
    this.#fit();
    const go = byId("go");
    if (this.cannot || go.disabled) this.say(this.cannot, { wrong: true });
    go.disabled = Boolean(this.cannot);
  }

  /** Why this page has nothing to ask of the model; null if it has. */
  get cannot() {
    const { makes } = this.info;
    if (!makes.length || makes.includes("images")) return null;
    const other = makes.map((one) => ROUTES[one]).filter(Boolean).join(" and ");
    return `This model makes ${makes.join(" and ")}, no images. Ask for it at ${other || "the API"}; the chart shows it too.`;
  }

  #examples(examples) {
    byId("examples").hidden = !examples.length;
    if (examples.length) this.#fields.prompt.placeholder = examples[0];
    byId("examples").replaceChildren(...examples.map((text) => {
      const button = el("button", { type: "button", className: "example", textContent: text });
      button.addEventListener("click", () => { this.#fields.prompt.value = text; this.#fields.prompt.focus(); });
      return button;
    }));
  }

  /** Whether the model takes a field; with an image it may be another pipeline of its family. */
  takes(name) {
    const known = (this.image ? this.info.image_parameters : null) ?? this.info.parameters;
    return !known.length || known.includes(name);
  }

  #fit() {
    for (const field of this.#form.querySelectorAll("[data-parameter]")) field.hidden = !this.takes(field.dataset.parameter);
    byId("size").hidden = !(this.takes("width") && this.takes("height"));
    byId("drop-hint").hidden = Boolean(this.cannot) || !this.info.image_parameters && this.info.parameters.length > 0;
  }

  useImage(image) {
    if (this.image) URL.revokeObjectURL(this.image.url);
    this.image = image;
    byId("chip").hidden = !image;
    if (image) {
      byId("chip-image").src = image.url;
      byId("chip-name").textContent = image.name;
    }
    this.#strength();
    this.#fit();
  }

  #strength() {
    byId("strength-shown").textContent = this.#fields.strength.value;
  }

  #swap() {
    const { width, height } = this.#fields;
    const value = (field) => field.value || (Number(field.placeholder) ? field.placeholder : "");
    [width.value, height.value] = [value(height), value(width)];
  }

  /** How many images to ask for at once. */
  get count() {
    return Math.min(16, Math.max(1, Math.trunc(Number(this.#fields.count.value)) || 1));
  }

  /** The fields of a request, the `index`-th of several at once. */
  read(index) {
    const fields = this.#fields;
    const asked = { prompt: fields.prompt.value.trim() };
    if (this.info.models.length) asked.model = fields.model.value || this.info.models[0];
    if (this.takes("negative_prompt") && fields.negative_prompt.value.trim()) {
      asked.negative_prompt = fields.negative_prompt.value.trim();
    }
    for (const name of NUMBERS) if (this.takes(name) && fields[name].value !== "") asked[name] = Number(fields[name].value);
    if (this.takes("width") && this.takes("height")) Object.assign(asked, this.#sides());
    const seed = fields.seed.value.trim();
    if (seed) asked.seed = /^-?\d+$/.test(seed) ? String(BigInt(seed) + BigInt(index)) : seed;
    if (this.image && this.takes("strength")) asked.strength = Number(fields.strength.value);
    return asked;
  }

  /** Both sides, if either was given. */
  #sides() {
    const { width, height } = this.#fields;
    if (!width.value && !height.value) return {};
    const [ownWidth, ownHeight] = this.info.default_size ?? [];
    const side = (field, own, other) => Number(field.value || own || other.value);
    return { width: side(width, ownWidth, height), height: side(height, ownHeight, width) };
  }

  /** Puts parameters back, as they stand in a PNG file; what is not among them becomes the model's own. */
  restore(found) {
    const fields = this.#fields;
    for (const name of ["prompt", "negative_prompt", ...NUMBERS, "width", "height", "seed"]) {
      fields[name].value = ["string", "number"].includes(typeof found[name]) ? found[name] : "";
    }
    if (typeof found.strength === "number") fields.strength.value = found.strength;
    if (this.info.models.includes(found.model)) fields.model.value = found.model;
    byId("negative").open = Boolean(fields.negative_prompt.value);
    fields.count.value = 1;
    this.#strength();
  }

  /** A line above the button, with what can be done about it. */
  say(text, { wrong = false, act = null } = {}) {
    this.#note.hidden = !text;
    this.#note.classList.toggle("wrong", wrong);
    this.#note.replaceChildren(text ?? "");
    if (act) {
      const button = el("button", { type: "button", className: "link", textContent: act.text });
      button.addEventListener("click", act.run);
      this.#note.append(" ", button);
    }
  }

  /** Shows which field the server has refused, and why. */
  refuse(error) {
    this.say(error.message, { wrong: true });
    const field = this.#fields[error.param === "size" ? "width" : error.param];
    if (field?.setAttribute) {
      field.setAttribute("aria-invalid", "true");
      field.focus?.();
    }
  }
}
