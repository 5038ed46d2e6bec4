// One connection for the ticks and for all images that this tab has asked for. A browser has six to a server, for all
// of its tabs: one for each image would leave none to cancel with.

import { ApiError, ask, events } from "./api.js";

const RETRY_MS = 1000;

export class Feed {
  #on; #after = 0; #name = null; #channel = null; #abort = null; #opened = null; #busy;

  /**
   * @param on Called with the kind and the data of each event, and with "open", "lost", "reset" and "missed".
   * @param busy Whether requests of this tab wait or run: then a hidden tab keeps its connection.
   */
  constructor(on, busy) {
    this.#on = on;
    this.#busy = busy;
    this.#expect();
    document.addEventListener("visibilitychange", () => this.#wake?.());
  }

  #wake = null;

  #expect() {
    if (this.#opened && !this.#opened.done) return; // it did not open: who waits for it waits for the next one
    const opened = { done: false };
    opened.promise = new Promise((resolve) => { opened.open = () => { opened.done = true; resolve(); }; });
    this.#opened = opened;
  }

  /** Reads for ever; raises only what asking again would not mend (a key that is missing). */
  async run() {
    for (;;) {
      await this.#seen();
      try {
        await this.#read();
      } catch (error) {
        if (error instanceof ApiError && error.status === 401) throw error;
        this.#on("lost", { error });
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      }
      this.#expect();
    }
  }

  /** A hidden tab without work gives its connection to the others. */
  async #seen() {
    while (document.hidden && !this.#busy()) {
      await new Promise((resolve) => { this.#wake = resolve; });
    }
  }

  async #read() {
    this.#channel = crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint32Array(4)), String).join("-");
    this.#abort = new AbortController();
    this.#wake = () => { if (document.hidden && !this.#busy()) this.#abort.abort(); };
    const known = this.#name === null ? "" : `&feed=${this.#name}&after=${this.#after}`;
    const path = `v1/ticks?channel=${this.#channel}${known}`;
    try {
      const response = await ask(path, { signal: this.#abort.signal });
      for await (const { id, kind, data } of events(response)) this.#take(id, kind, data);
    } catch (error) {
      if (!this.#abort.signal.aborted) throw error;
    } finally {
      this.#wake = null;
    }
  }

  #take(id, kind, data) {
    if (kind === "hello") {
      if (this.#name !== null && this.#name !== data.feed) {
        this.#after = 0;
        this.#on("reset", data); // another life of the server
      }
      this.#name = data.feed;
      this.#on("open", data);
      this.#opened.open();
      return;
    }
    if (id !== null) {
      if (this.#after && id > this.#after + 1) this.#on("missed", data);
      this.#after = id;
    }
    this.#on(kind, data);
  }

  /** Asks for an image that will come over this connection. Returns the request's id and seed. */
  async post(path, body) {
    for (let attempt = 0; ; attempt++) {
      await this.#opened.promise;
      const headers = { "steploom-channel": this.#channel };
      try {
        const answer = await (await ask(path, { method: "POST", headers, body })).json();
        return answer.data[0];
      } catch (error) { // between two connections: the server ends one that had nothing to do
        if (!(error instanceof ApiError && error.code === "no_channel" && attempt < 3)) throw error;
        await new Promise((resolve) => setTimeout(resolve, 50));
      }
    }
  }
}
