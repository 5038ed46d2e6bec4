// The strip chart: lanes over ticks, newest at the right. The canvas has the picture; a list beside it has one element
// for each lane, with the lane's facts as data attributes, for screen readers and for tests.

import { byId, calm, company, dye, DYES, el } from "./dom.js";

const AXIS = 20; // pixels below the lanes, for the numbers of the ticks
const TALLEST = 30, LOWEST = 6, LABELLED = 15;
const EASE_MS = 110;

export class Chart {
  #lanes; #name; #pick; #canvas = byId("strip"); #list = byId("lanes"); #tip = byId("tip");
  #paint = {}; #size = { width: 0, height: 0, column: 10 };
  #behind = 0; #drawn = 0; #frame = 0; #labels = new Map(); #cursor = null; #lit = null;

  /**
   * @param lanes The state to draw.
   * @param name What to call a lane: its prompt, where that is known here.
   * @param pick Called with the lane that the pointer is at, or null.
   */
  constructor(lanes, name, pick) {
    this.#lanes = lanes;
    this.#name = name;
    this.#pick = pick;
    new ResizeObserver(() => this.#measure()).observe(this.#canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#measure());
    this.#canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerdown", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerleave", () => this.#unpoint());
    this.#canvas.addEventListener("blur", () => this.#unpoint());
    this.#canvas.addEventListener("keydown", (event) => this.#step(event));
    this.#measure();
  }

  /** Columns have come: they slide in, unless motion is unwelcome. */
  advance(columns) {
    this.#behind = calm() ? 0 : Math.min(4, this.#behind + columns);
    this.draw();
  }

  draw() {
    if (!this.#frame) this.#frame = requestAnimationFrame((now) => this.#tick(now));
  }

  light(id) {
    this.#lit = id;
    this.draw();
  }

  #measure() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    this.#paint = { ink: colour("--ink"), muted: colour("--muted"), line: colour("--line"), panel: colour("--panel"),
      dyes: Array.from({ length: DYES }, (_, number) => colour(`--dye-${number}`)) };
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const ratio = devicePixelRatio || 1;
    Object.assign(this.#canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
    this.#canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    this.#size = { width, height, column: width < 480 ? 9 : 13 };
    this.draw();
  }

  #tick(now) {
    this.#frame = 0;
    const passed = Math.min(64, Math.max(0, now - this.#drawn)); // a screenshot may turn the clock back
    this.#drawn = now;
    const left = calm() ? 0 : Math.exp(-passed / EASE_MS);
    this.#behind = this.#behind * left < 0.01 ? 0 : this.#behind * left;
    const moving = this.#place(left);
    this.#picture();
    if (this.#behind || moving) this.draw();
  }

  /** Gives each lane that is shown its height and place; returns whether one still moves. */
  #place(left) {
    const { width, height, column } = this.#size;
    const room = height - AXIS;
    const from = this.#lanes.at - Math.ceil(width / column);
    const shown = this.#lanes.shown(from).slice(-Math.floor(room / LOWEST));
    const tall = Math.min(TALLEST, room / Math.max(1, shown.length));
    let moving = false;
    shown.forEach((lane, place) => {
      const goal = place * tall;
      lane.y = lane.y === undefined ? goal : goal + (lane.y - goal) * left;
      if (Math.abs(lane.y - goal) < 0.5) lane.y = goal;
      else moving = true;
    });
    Object.assign(this, { shown, tall });
    this.#label(shown, tall);
    return moving;
  }

  #label(shown, tall) {
    const gone = new Set(this.#labels.keys());
    for (const lane of shown) {
      gone.delete(lane.id);
      let item = this.#labels.get(lane.id);
      if (!item) {
        item = el("li", {}, el("i"), el("b"), el("span"), el("em"));
        item.addEventListener("pointerenter", () => this.#pick(lane));
        item.addEventListener("pointerleave", () => this.#pick(null));
        this.#labels.set(lane.id, item);
        this.#list.append(item);
      }
      const steps = lane.first === null ? "waits" : `${lane.step}/${lane.total ?? "?"}`;
      Object.assign(item.dataset, { request: lane.id, number: lane.number, first: lane.first ?? "", last: lane.last ?? "",
        columns: lane.cells.length, step: lane.step, total: lane.total ?? "", phase: lane.phase,
        outcome: lane.outcome ?? "", batch: lane.batch });
      const [dot, number, name, count] = item.children;
      const own = this.#name(lane.id);
      item.classList.toggle("foreign", own === undefined);
      dot.style.background = dye(lane.number);
      number.textContent = lane.number;
      name.textContent = own ?? "from elsewhere";
      count.textContent = lane.outcome && lane.outcome !== "completed" ? lane.outcome : steps;
      item.classList.toggle("over", lane.endedAt !== null);
      item.classList.toggle("small", tall < LABELLED);
      item.classList.toggle("lit", lane.id === this.#lit);
      item.style.height = `${tall}px`;
      item.style.transform = `translateY(${lane.y}px)`;
    }
    for (const id of gone) {
      this.#labels.get(id).remove();
      this.#labels.delete(id);
    }
  }

  /** The left edge of a column. */
  #x(at) {
    return this.#size.width - 14 - (this.#lanes.at - at + 1 - this.#behind) * this.#size.column;
  }

  #picture() {
    const { width, height, column } = this.#size;
    const paper = this.#canvas.getContext("2d");
    paper.clearRect(0, 0, width, height);
    const columns = this.#lanes.columns.slice(-Math.ceil(width / column) - 5);
    this.#warp(paper);
    this.#axis(paper, columns);
    for (const one of columns) this.#threads(paper, one);
    for (const lane of this.shown) this.#lane(paper, lane, columns[0]?.at ?? 0);
    if (this.#cursor && this.shown.includes(this.#cursor.lane)) this.#mark(paper, this.#cursor);
  }

  /** The loom, before anything is woven: a thread for each column; as it has nothing to show yet, a pattern of lanes. */
  #warp(paper) {
    const { width, height, column } = this.#size;
    const ticks = Math.ceil(width / column) + 1;
    paper.fillStyle = this.#paint.line;
    paper.globalAlpha = 0.45;
    for (let back = 0; back <= ticks; back++) {
      paper.fillRect(Math.round(this.#x(this.#lanes.at - back) + column / 2), 0, 1, height - AXIS + 3);
    }
    if (!this.#lanes.at && !this.#lanes.lanes.size) this.#sample(paper, ticks);
    paper.globalAlpha = 1;
  }

  /** What it may look like: made up, and pale. */
  #sample(paper, ticks) {
    const { height, column } = this.#size;
    const lanes = 7, tall = (height - AXIS) / lanes;
    for (let lane = 0; lane < lanes; lane++) {
      const from = Math.round((ticks * lane) / (lanes + 2)), steps = Math.round(ticks * (0.3 + 0.13 * ((lane * 2) % 3)));
      for (let step = 1; step <= steps && from + step < ticks; step++) {
        paper.globalAlpha = 0.05 + (0.22 * step) / steps;
        paper.fillStyle = this.#paint.dyes[(lane + 1) % DYES];
        paper.beginPath();
        paper.roundRect(this.#x(from + step - ticks) + 0.75, (lane + 0.22) * tall, column - 1.5, tall * 0.56, 2.5);
        paper.fill();
      }
    }
  }

  #axis(paper, columns) {
    const { height, column } = this.#size;
    paper.font = "11px system-ui, sans-serif";
    paper.textAlign = "center";
    for (const one of columns) {
      if (one.tick % 10) continue;
      const x = this.#x(one.at) + column / 2;
      paper.fillStyle = this.#paint.line;
      paper.fillRect(Math.round(x), 0, 1, height - AXIS + 3);
      paper.fillStyle = this.#paint.muted;
      if (x > 14) paper.fillText(one.tick, x, height - 4);
    }
  }

  /** Ties those together that share a forward: one thread for each group of the column. */
  #threads(paper, one) {
    const spans = new Map();
    for (const [lane, cell] of one.cells) {
      if (cell.group === null || cell.batch < 1.5 || !this.shown.includes(lane)) continue;
      const y = lane.y + this.tall / 2;
      const [top, end] = spans.get(cell.group) ?? [y, y];
      spans.set(cell.group, [Math.min(top, y), Math.max(end, y)]);
    }
    paper.fillStyle = this.#paint.ink;
    paper.globalAlpha = 0.3;
    for (const [group, [top, end]] of spans) {
      const x = this.#x(one.at) + this.#size.column / 2 + (group ? group * 2 : 0);
      paper.fillRect(Math.round(x) - 0.75, top, 1.5, end - top);
    }
    paper.globalAlpha = 1;
  }

  #lane(paper, lane, from) {
    const { column } = this.#size;
    const tall = Math.max(3, this.tall * 0.58), y = lane.y + (this.tall - tall) / 2, middle = lane.y + this.tall / 2;
    const colour = this.#paint.dyes[lane.number % DYES];
    const quiet = this.#lit !== null && this.#lit !== lane.id;
    this.#waiting(paper, lane, from, middle);
    for (const cell of lane.cells) {
      if (cell.at < from) continue;
      const x = this.#x(cell.at) + 0.75, wide = column - 1.5;
      paper.beginPath();
      paper.roundRect(x, y, wide, tall, Math.min(2.5, tall / 2));
      // From pale to full, as the image comes out of the noise.
      paper.globalAlpha = (quiet ? 0.35 : 1) * (cell.total ? 0.38 + 0.62 * (cell.step / cell.total) : 0.8);
      paper.fillStyle = paper.strokeStyle = colour;
      paper.lineWidth = 1.25;
      if (cell.stepped) paper.fill();
      else paper.stroke();
      paper.globalAlpha = quiet ? 0.35 : 1;
      if (cell.joined) paper.fillRect(x - 0.75, y - 2, 2, tall + 4);
    }
    if (lane.endedAt !== null) this.#end(paper, lane, middle, colour);
    paper.globalAlpha = 1;
  }

  #waiting(paper, lane, from, middle) {
    const { column } = this.#size;
    const until = lane.cells.length ? lane.cells[0].at : lane.endedAt === null ? this.#lanes.at + 1 : lane.endedAt + 1;
    paper.fillStyle = this.#paint.muted;
    for (let at = Math.max(from, lane.queuedAt + 1); at < until; at++) {
      paper.fillRect(this.#x(at) + column / 2 - 1, middle - 1, 2, 2);
    }
  }

  #end(paper, lane, middle, colour) {
    const { column } = this.#size;
    const x = this.#x(Math.max(lane.lastAt ?? 0, lane.queuedAt) + 1) + column * 0.45, size = Math.min(3, this.tall / 3);
    paper.beginPath();
    if (lane.outcome === "completed") {
      paper.arc(x, middle, size, 0, 2 * Math.PI);
      paper.fillStyle = colour;
      paper.fill();
      return;
    }
    paper.moveTo(x - size, middle - size);
    paper.lineTo(x + size, middle + size);
    paper.moveTo(x + size, middle - size);
    paper.lineTo(x - size, middle + size);
    paper.strokeStyle = this.#paint.ink;
    paper.lineWidth = 1.75;
    paper.stroke();
  }

  #mark(paper, { lane, cell }) {
    const { column } = this.#size;
    paper.strokeStyle = this.#paint.ink;
    paper.lineWidth = 1.5;
    paper.beginPath();
    const tall = Math.max(6, this.tall * 0.8);
    paper.roundRect(this.#x(cell.at) - 0.5, lane.y + (this.tall - tall) / 2, column + 1, tall, 4);
    paper.stroke();
  }

  #point(event) {
    const at = this.#lanes.at - Math.floor((this.#size.width - 14 - event.offsetX) / this.#size.column);
    const lane = this.shown?.find((one) => event.offsetY >= one.y && event.offsetY < one.y + this.tall);
    const cell = lane?.cells.find((one) => one.at === at);
    if (cell) this.#show(lane, cell);
    else this.#unpoint();
  }

  /** Arrow keys walk along a lane, and from lane to lane. */
  #step(event) {
    const [across, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    if (across === undefined || !this.shown?.length) return;
    event.preventDefault();
    const { lane, cell } = this.#cursor ?? { lane: this.shown.at(-1), cell: null };
    const other = this.shown[this.shown.indexOf(lane) + down] ?? lane;
    const cells = other.cells;
    const place = cell ? cells.findLastIndex((one) => one.at <= cell.at) + across : cells.length - 1;
    if (cells.length) this.#show(other, cells[Math.min(cells.length - 1, Math.max(0, place))]);
  }

  #show(lane, cell) {
    this.#cursor = { lane, cell };
    const shared = cell.batch ? company(cell.batch) : "no forward of the denoiser";
    this.#tip.textContent = `#${lane.number} · ${cell.stepped ? "step" : cell.phase} ${cell.step} of ${cell.total ?? "?"}`
      + ` · ${shared} · tick ${cell.tick}`;
    this.#tip.hidden = false;
    const left = this.#canvas.offsetLeft + this.#x(cell.at) + this.#size.column / 2;
    const most = this.#canvas.offsetLeft + this.#size.width - this.#tip.offsetWidth - 4;
    this.#tip.style.left = `${Math.max(4, Math.min(most, left - this.#tip.offsetWidth / 2))}px`;
    this.#tip.style.top = `${lane.y + this.tall + 4}px`;
    this.#pick(lane);
  }

  #unpoint() {
    this.#cursor = null;
    this.#tip.hidden = true;
    this.#pick(null);
  }
}
