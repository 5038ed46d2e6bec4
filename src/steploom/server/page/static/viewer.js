// An image enlarged; a slider goes back through the steps that made it.

import { byId, duration, el } from "./dom.js";

export class Viewer {
  #dialog = byId("viewer"); #image = byId("viewer-image"); #range = byId("film-range"); #card = null; #on;

  /** @param on {cards(), again(card), start(card)}: what its buttons do. */
  constructor(on) {
    this.#on = on;
    byId("viewer-close").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("click", (event) => { if (event.target === this.#dialog) this.#dialog.close(); });
    this.#dialog.addEventListener("keydown", (event) => this.#step(event));
    this.#range.addEventListener("input", () => this.#frame());
  }

  open(card) {
    this.#card = card;
    byId("viewer-prompt").textContent = card.asked.prompt;
    byId("viewer-facts").textContent = [`${card.total} steps`, `seed ${card.seed}`, duration(card.seconds),
      ...this.#more(card.asked.fields)].join(" · ");
    this.#image.alt = card.asked.prompt;
    byId("film").hidden = card.film.length < 2;
    Object.assign(this.#range, { max: card.film.length - 1, value: card.film.length - 1 });
    this.#frame();
    byId("viewer-actions").replaceChildren(...this.#actions(card));
    if (!this.#dialog.open) this.#dialog.showModal();
  }

  #more(fields) {
    const labels = { guidance_scale: "guidance", true_cfg_scale: "true CFG", strength: "strength" };
    return Object.entries(labels).filter(([name]) => fields[name] !== undefined)
      .map(([name, label]) => `${label} ${fields[name]}`);
  }

  #actions(card) {
    const button = (text, act) => {
      const made = el("button", { type: "button", className: "second", textContent: text });
      made.addEventListener("click", () => { this.#dialog.close(); act(card); });
      return made;
    };
    const save = el("a", { className: "second", href: card.url, download: card.name, textContent: "Download" });
    return [save, button("Use these settings", this.#on.again), ...(this.#on.start ? [button("Start from it", this.#on.start)] : [])];
  }

  #frame() {
    const shown = this.#card.film[Number(this.#range.value)] ?? this.#card.film.at(-1);
    this.#image.src = shown.url;
    byId("film-step").textContent = `${shown.step} of ${this.#card.total}`;
  }

  /** Arrow keys go to the next image; on the slider they move the slider. */
  #step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.target === this.#range) return;
    const cards = this.#on.cards();
    const next = cards[cards.indexOf(this.#card) + by];
    if (next) this.open(next);
  }
}
