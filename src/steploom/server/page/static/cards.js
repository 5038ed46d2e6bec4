// One card for each image that this tab has asked for: it waits, sharpens step by step, and stays in the gallery.

import { ask } from "./api.js";
import { blobOf, byId, company, duration, dye, el } from "./dom.js";

const FILMS = 24; // finished cards that keep the previews of their steps, for the viewer
const GALLERY = 200; // finished cards that stay
const EARLY = 200; // events that came before the answer that says whose they are

export class Cards {
  #all = []; #byId = new Map(); #early = []; #list = byId("cards"); #on;

  /** @param on {changed(), open(card), light(id), lane(id)}: what happens around the cards. */
  constructor(on) {
    this.#on = on;
  }

  get all() { return this.#all; }
  get live() { return this.#all.filter((card) => card.live); }

  /** A new card, at the front. `send` asks for its image, and resolves to the request's id and seed. */
  async add(asked, send) {
    const card = new Card(asked, this.#on);
    this.#all.unshift(card);
    this.#list.prepend(card.element);
    this.#on.changed();
    try {
      const { id, seed } = await send();
      card.accepted(id, seed, this.#on.lane(id));
      this.#byId.set(id, card);
      const own = this.#early.filter((event) => event.ids.includes(id));
      this.#early = this.#early.filter((event) => !event.ids.includes(id));
      for (const { kind, data } of own) this.#give(card, kind, data);
      if (card.unwanted) card.cancel();
    } catch (error) {
      card.fail(error.message, "failed");
      if (error.status === 400) card.refused = error;
    }
    this.#on.changed();
    return card;
  }

  /** Takes in an event of the feed that is about images. */
  take(kind, data) {
    for (const id of data.request_ids ?? [data.request_id]) {
      const card = this.#byId.get(id);
      if (card) this.#give(card, kind, data);
      else this.#early = [...this.#early.slice(1 - EARLY), { ids: [id], kind, data }];
    }
  }

  #give(card, kind, data) {
    if (kind.endsWith(".partial_image")) card.preview(data);
    else if (kind.endsWith(".completed")) card.complete(data);
    else card.fail(data.error.message, data.error.code === "request_cancelled" ? "cancelled" : "failed");
    this.#trim();
    this.#on.changed();
  }

  /** What a tick says of a request. */
  follow(lane) {
    this.#byId.get(lane.id)?.follow(lane);
  }

  /** The connection is gone, and with it all that ran for it. */
  lose() {
    for (const card of this.live) if (card.id) card.fail("The connection to the server was lost.", "failed");
    this.#on.changed();
  }

  find(id) { return this.#byId.get(id); }

  clear() {
    this.#drop(this.#all.filter((one) => !one.live));
    this.#on.changed();
  }

  #drop(cards) {
    for (const card of cards) {
      card.release();
      card.element.remove();
      this.#byId.delete(card.id);
    }
    this.#all = this.#all.filter((one) => !cards.includes(one));
  }

  /** Lets go of the oldest films: pictures are memory until they are revoked. */
  #trim() {
    const finished = this.#all.filter((one) => !one.live);
    for (const card of finished.slice(FILMS)) card.releaseFilm();
    this.#drop(finished.slice(GALLERY));
  }
}

export class Card {
  id = null; number = null; state = "sending"; seed = null; url = null; film = []; step = 0; total = null; unwanted = false;
  #on; #began = performance.now(); #parts;

  constructor(asked, on) {
    this.asked = asked; // {prompt, fields}: to show, and to ask again
    this.#on = on;
    const image = el("img", { alt: asked.prompt, hidden: true });
    const shot = el("button", { type: "button", className: "shot", disabled: true,
      aria: { label: `Enlarge: ${asked.prompt}` } }, el("span", { className: "weave" }), image);
    const corner = el("button", { type: "button", className: "corner quiet", textContent: "✕", title: "Cancel",
      aria: { label: `Cancel: ${asked.prompt}` } });
    const bar = el("span", { className: "bar", role: "progressbar", aria: { label: "Steps" } });
    const count = el("strong", { className: "count", textContent: "sending" });
    const mates = el("span", { className: "mates" });
    const number = el("span", { className: "number" });
    this.#parts = { image, shot, corner, bar, count, mates, number };
    this.element = el("li", { className: "card" }, shot, bar, corner,
      el("div", { className: "facts" }, number, count, mates), el("p", { className: "words", textContent: asked.prompt }));
    shot.addEventListener("click", () => on.open(this));
    corner.addEventListener("click", () => (this.live ? this.cancel() : this.save()));
    this.element.addEventListener("pointerenter", () => on.light(this.id));
    this.element.addEventListener("pointerleave", () => on.light(null));
    this.#show();
  }

  get live() { return ["sending", "waiting", "running", "cancelling"].includes(this.state); }
  get name() { return `steploom-${this.number ?? 0}-seed-${this.seed}.png`; }

  accepted(id, seed, lane) {
    Object.assign(this, { id, seed, state: this.state === "sending" ? "waiting" : this.state });
    this.element.dataset.request = id;
    if (lane) this.follow(lane);
    this.#show();
  }

  follow(lane) {
    this.number = lane.number;
    if (this.live && lane.first !== null) {
      if (this.state === "waiting") this.state = "running";
      Object.assign(this, { step: lane.step, total: lane.total, batch: lane.batch, phase: lane.phase });
    }
    this.#show();
  }

  preview({ b64_json: data, output_format: kind, step }) {
    if (!this.live) return;
    const url = URL.createObjectURL(blobOf(data, `image/${kind}`));
    this.film.push({ step, url });
    this.#picture(url);
  }

  complete({ b64_json: data, output_format: kind, seed, step }) {
    this.blob = blobOf(data, `image/${kind}`);
    this.url = URL.createObjectURL(this.blob);
    Object.assign(this, { state: "completed", seed, step, total: step });
    this.seconds = (performance.now() - this.#began) / 1000;
    this.film.push({ step, url: this.url });
    this.#picture(this.url);
    this.#show();
  }

  fail(message, state) {
    if (!this.live) return;
    Object.assign(this, { state, message });
    this.releaseFilm();
    this.#parts.image.hidden = true;
    this.#parts.image.removeAttribute("src");
    this.#show();
  }

  /** Ends the request; what remains to be told comes over the feed. */
  async cancel() {
    this.unwanted = true;
    if (!this.live) return;
    this.state = "cancelling";
    this.#show();
    if (!this.id) return; // as soon as it has one
    await ask(`v1/requests/${encodeURIComponent(this.id)}`, { method: "DELETE" }).catch((error) => {
      if (error.status !== 404) this.fail(error.message, "failed"); // 404: it has ended meanwhile
    });
  }

  save() {
    if (this.url) el("a", { href: this.url, download: this.name }).click();
  }

  /** Its pictures take memory until they are revoked. */
  release() {
    this.releaseFilm();
    if (this.url) URL.revokeObjectURL(this.url);
  }

  releaseFilm() {
    for (const { url } of this.film) if (url !== this.url) URL.revokeObjectURL(url);
    this.film = this.url ? this.film.slice(-1) : [];
  }

  #picture(url) {
    this.#parts.image.src = url;
    this.element.dataset.pictures = this.film.length;
    this.#parts.image.hidden = false;
    this.element.classList.add("pictured");
  }

  #show() {
    const { shot, corner, bar, count, mates, number } = this.#parts;
    this.element.dataset.state = this.state;
    this.element.style.setProperty("--dye", this.number === null ? "var(--muted)" : dye(this.number));
    this.element.style.setProperty("--done", this.total ? this.step / this.total : 0);
    number.textContent = this.number === null ? "" : `#${this.number}`;
    bar.setAttribute("aria-valuenow", this.step);
    bar.setAttribute("aria-valuemax", this.total ?? 0);
    count.textContent = this.#counted();
    mates.textContent = this.state === "running" && this.batch ? company(this.batch) : this.#after();
    mates.title = this.state === "running" ? "how many requests share its forward" : "";
    shot.disabled = !this.url;
    corner.hidden = this.state === "cancelling" || (!this.live && !this.url);
    if (!this.live) {
      corner.textContent = "↓";
      corner.title = "Download, with the parameters in the file";
      corner.setAttribute("aria-label", `Download: ${this.asked.prompt}`);
    }
  }

  #counted() {
    if (this.state === "running") return `${this.step}/${this.total ?? "?"}`;
    if (this.state === "completed") return `${this.total} steps`;
    return { sending: "sending", waiting: "waiting", cancelling: "cancelling" }[this.state] ?? this.state;
  }

  #after() {
    if (this.state === "completed") return duration(this.seconds);
    return this.state === "failed" ? this.message : "";
  }
}
