// What the chart shows: a lane for each request, a column for each tick. Plain state, fed by the server's events.

export const MOST_COLUMNS = 600;

export class Lanes {
  /** Newest last; each is {at, tick, seconds, waiting, groups, cells: Map(lane -> cell)}. */
  columns = [];
  /** By request id: {id, number, queuedAt, cells, first, last, step, total, phase, batch, outcome, endedAt}. */
  lanes = new Map();
  #at = 0; // columns so far: ticks start again at 1 when an engine does

  get at() { return this.#at; }

  reset() {
    this.columns = [];
    this.lanes.clear();
    this.#at = 0;
  }

  /** Takes in an event of the feed. Returns the lanes that it changed. */
  take(kind, data) {
    if (kind === "queued") return [this.#lane(data.id, data.number)];
    if (kind === "ended") return this.#end(data);
    return kind === "tick" ? this.#tick(data) : [];
  }

  #lane(id, number) {
    let lane = this.lanes.get(id);
    if (!lane) {
      lane = { id, number, queuedAt: this.#at, cells: [], first: null, last: null, step: 0, total: null,
        phase: "queued", batch: 0, outcome: null, endedAt: null };
      this.lanes.set(id, lane);
    }
    return lane;
  }

  #end({ id, number, outcome }) {
    const lane = this.lanes.get(id);
    if (!lane) return [];
    Object.assign(lane, { outcome, endedAt: this.#at, number });
    return [lane];
  }

  #tick({ tick, seconds, waiting, groups, requests }) {
    const at = ++this.#at;
    const column = { at, tick, seconds, waiting, groups, cells: new Map() };
    const changed = requests.map((given) => {
      const lane = this.#lane(given.id, given.number);
      const cell = { at, tick, step: given.step, total: given.total, phase: given.phase, stepped: given.stepped,
        joined: given.joined, group: given.group, batch: given.batch_requests };
      lane.cells.push(cell);
      lane.first ??= tick;
      Object.assign(lane, { last: tick, lastAt: at, step: given.step, total: given.total, phase: given.phase });
      if (given.batch_requests) lane.batch = given.batch_requests;
      column.cells.set(lane, cell);
      return lane;
    });
    this.columns.push(column);
    this.#forget();
    return changed;
  }

  /** Lets go of what has left the chart. */
  #forget() {
    if (this.columns.length > MOST_COLUMNS) this.columns.splice(0, this.columns.length - MOST_COLUMNS);
    const oldest = this.columns[0].at;
    for (const [id, lane] of this.lanes) {
      if (lane.endedAt !== null && Math.max(lane.endedAt, lane.lastAt ?? 0) < oldest) this.lanes.delete(id);
    }
  }

  /** The lanes that have something to show from column `from` on, in the order in which they came. */
  shown(from) {
    return [...this.lanes.values()].filter((lane) => lane.endedAt === null || lane.endedAt >= from);
  }

  get running() {
    return [...this.lanes.values()].filter((lane) => lane.endedAt === null);
  }
}
