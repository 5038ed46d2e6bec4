// Puts the page together: the form asks, the feed tells, the chart and the cards show.

import { ApiError, ask, setKey } from "./api.js";
import { Cards } from "./cards.js";
import { Chart } from "./chart.js";
import { byId, calm, duration } from "./dom.js";
import { fitted, listen, start, use } from "./drop.js";
import { Feed } from "./feed.js";
import { Form } from "./form.js";
import { Lanes } from "./lanes.js";
import { Viewer } from "./viewer.js";

const lanes = new Lanes();
const cards = new Cards({
  changed: showWork,
  open: (card) => viewer.open(card),
  light: (id) => chart.light(id),
  lane: (id) => lanes.lanes.get(id),
});
const chart = new Chart(lanes, (id) => cards.find(id)?.asked.prompt, light);
const feed = new Feed(take, () => cards.live.length > 0);
const form = new Form(submit);
const viewer = new Viewer({
  cards: () => cards.all.filter((card) => card.url),
  again: (card) => { form.restore({ ...card.asked.fields, seed: card.seed }); form.say("Its settings are back."); },
  start: (card) => start(new File([card.blob], card.name, { type: card.blob.type }), form),
});

/** Asks for as many images as the form says, each a request of its own. */
async function submit() {
  if (!form.info || form.cannot) return;
  form.say(null);
  const count = form.count, image = form.image;
  const asked = Array.from({ length: count }, (_, index) => form.read(index));
  if (!asked[0].prompt && form.takes("prompt")) {
    form.refuse({ message: "Say what to draw.", param: "prompt" });
    return;
  }
  if (form.info.needs_image && !image) {
    form.say(`${form.info.pipeline_class} starts from an image: drop one anywhere.`, { wrong: true });
    return;
  }
  if (matchMedia("(max-width: 56rem)").matches) { // the cards are below the form there
    document.activeElement?.blur();
    byId("work-title").scrollIntoView({ behavior: calm() ? "auto" : "smooth" });
  }
  const [ownWidth, ownHeight] = form.info.default_size ?? [];
  const picture = image && await fitted(image.file, asked[0].width ?? ownWidth, asked[0].height ?? ownHeight)
    .catch(() => image.file); // the server says what is wrong with it
  const made = await Promise.all(asked.map((fields) => cards.add({ prompt: fields.prompt, fields }, () => send(fields, picture))));
  const refused = made.find((card) => card.refused);
  if (refused) form.refuse(refused.refused);
}

/** As a form, whose values are text: a seed may have more digits than a number of JavaScript's holds. */
function send(fields, picture) {
  const body = { ...fields, stream: true, preview_every: 1, metadata: true };
  const data = new FormData();
  for (const [name, value] of Object.entries(body)) data.append(name, value);
  if (!picture) return feed.post("v1/images/generations", data);
  data.append("image", picture, "image.png");
  return feed.post("v1/images/edits", data);
}

/** An event of the feed. */
function take(kind, data) {
  if (kind === "lost") {
    cards.lose();
    say("lost", "connecting again");
    byId("batch-now").textContent = "The server does not answer. What it did last stays here.";
  } else if (kind === "reset") { // another server, perhaps with another model
    lanes.reset();
    learn();
  } else if (kind === "missed") {
    lanes.reset(); // whoever ended meanwhile would seem to run for ever; whoever runs is in the next tick
  } else if (kind === "open") {
    cards.lose(); // what came over the connection before this one ended with it
    showNow();
  } else if (kind === "error" || kind.startsWith("image_")) {
    cards.take(kind, data);
    return;
  } else {
    for (const lane of lanes.take(kind, data)) cards.follow(lane);
    if (kind === "tick") chart.advance(1);
    showNow();
  }
  chart.draw();
}

/** The pointer is at a lane: its card is lit, and it in the chart. */
function light(lane) {
  for (const card of cards.all) card.element.classList.toggle("lit", card.id !== null && card.id === lane?.id);
  chart.light(lane?.id ?? null);
}

function say(state, text) {
  byId("state").dataset.state = state;
  byId("state-text").textContent = text;
}

/** The line above the chart: what goes on now. */
function showNow() {
  const column = lanes.columns.at(-1);
  const running = lanes.running.length;
  const batch = running && column ? Math.max(0, ...[...column.cells.values()].map((cell) => cell.batch)) : 0;
  byId("lesson").hidden = lanes.lanes.size > 0 || lanes.columns.length > 0;
  byId("figure-sharing").textContent = Math.round(batch);
  byId("figure-waiting").textContent = running && column ? column.waiting : 0;
  byId("figure-seconds").textContent = column ? duration(column.seconds) : "–";
  say(running ? "running" : "idle", running ? `${running} running` : "idle");
  const busy = batch >= 1.5 ? `${Math.round(batch)} requests share each forward` : "One request, alone in its forward";
  const idle = column ? "Idle. What ran last stays until the next request." : "Ready, and idle.";
  byId("batch-now").textContent = running ? busy : idle;
}

function showWork() {
  const live = cards.live.length;
  byId("cards").dataset.live = live;
  byId("blank").hidden = cards.all.length > 0;
  byId("cancel-all").hidden = live < 2;
  byId("clear").hidden = live === cards.all.length;
  document.title = live ? `(${live}) steploom` : "steploom";
  chart.draw();
}

/** The model's facts; waits while it is being loaded, and asks for a key where one is wanted. */
async function learn() {
  for (;;) {
    try {
      const info = await (await ask("v1/info")).json();
      byId("model").textContent = info.models[0];
      byId("model").title = info.pipeline_class;
      form.learn(info);
      return;
    } catch (error) {
      if (error instanceof ApiError && error.status === 401) await askKey(error);
      else await loading(error);
    }
  }
}

async function loading(error) {
  say("lost", "not ready");
  byId("batch-now").textContent = error instanceof ApiError ? error.message : "The server does not answer.";
  await new Promise((resolve) => setTimeout(resolve, 1000));
}

function askKey(error) {
  const dialog = byId("key-dialog");
  byId("key-said").textContent = byId("key").value ? error.message : "It stays in this tab until you close it.";
  say("lost", "locked");
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => { setKey(byId("key").value.trim()); resolve(); }, { once: true });
  });
}

byId("cancel-all").addEventListener("click", () => { for (const card of cards.live) card.cancel(); });
byId("clear").addEventListener("click", () => cards.clear());
listen((file) => { if (form.info && !form.cannot) use(file, form); });

/** What the page shows, for tests and for the curious. */
window.steploom = { lanes, cards, form };

for (;;) {
  await learn();
  await feed.run().catch(() => {}); // the key is good no more: asked for again above
}
