// live.js: the engine while it works: its queues, its block pool, its last steps. Milestone M8.
// The records of /live go into the trace viewer's model one by one (model.js), and its drawing code draws the blocks
// (draw.js). A stream begins with a snapshot, and so does every thousandth step: the model then begins anew, so the page
// keeps no more than the records since.
"use strict";

import { ask, errorText, events } from "./client.js";

const STEPS_SHOWN = 120;
const CHART_HEIGHT = 72;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const byId = (id) => document.getElementById(id);

let header = null;
let model = null; // of the engine, as far as the records go
let record = null; // the newest one
let history = []; // {batch, held} of the last steps
let grid = { cell: 1, columns: 1 }; // where the blocks were drawn
let chosen = null; // the request whose blocks are outlined
let shown = 0; // which engine, if there are several
let isPaused = false;
let isWaitingForFrame = false;
let connection = null; // what ends the present stream
let trouble = null; // why there is no stream
const colourOf = new Map(); // request id -> index of its colour, which a new model must not change
const mine = new Map(); // id of a request of this page -> index of its colour, or null

// A request of this page begins. The engine's name for it contains `id`.
export function markMine(id) {
  mine.set(id, null);
}

// The colour of such a request, once the engine has told of it.
export function colourOfMine(id) {
  const index = mine.get(id);
  return index === null ? null : ownerColour({ index }, { isDark: isDark() });
}

function ownId(id) {
  const found = id.match(/[0-9a-f]{32}/)?.[0];
  return mine.has(found) ? found : null;
}

// ---- the stream

// Follows the engine while the page is in sight and not paused: for a page that does not look, the engine records
// nothing. A stream that breaks off is opened again.
export async function watchEngine() {
  for (let patience = 1; ; patience = Math.min(patience * 2, 30)) {
    await untilWanted();
    try {
      connection = new AbortController();
      const response = await ask("live", { signal: connection.signal });
      if (response.status === 401) patience = Infinity; // until there is a key
      if (!response.ok) throw new Error(await errorText(response));
      for await (const line of events(response)) {
        patience = 0.5;
        take(JSON.parse(line));
      }
      trouble = "the stream has ended";
    } catch (error) {
      if (connection.signal.aborted) continue;
      trouble = error instanceof TypeError ? "no connection" : error.message;
    }
    showState();
    await Promise.race([patience === Infinity ? new Promise(() => {}) : pause(patience * 1000), wish]);
  }
}

let fulfil;
let wish = new Promise((resolve) => (fulfil = resolve));

// Opens the stream now, e.g. with a new API key.
export function reconnect() {
  connection?.abort();
  fulfil();
  wish = new Promise((resolve) => (fulfil = resolve));
}

async function untilWanted() {
  while (document.hidden || isPaused) await wish;
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

document.addEventListener("visibilitychange", () => (document.hidden ? connection?.abort() : reconnect()));

function take(line) {
  const engine = line.replica ?? 0;
  if (engine >= byId("which").length) addEngines(engine + 1);
  if (engine !== shown) return;
  if (line.type === "dead") {
    trouble = "dead, starts again";
    showState();
    return;
  }
  if (line.type === "header") {
    header = line;
    return;
  }
  if (line.type === "snapshot") {
    model = new TraceModel({ name: "live", header, steps: [] });
    if (record?.step !== line.step) history = []; // steps are missing, or it is another engine
  }
  const known = model.lives.length;
  model.push(line);
  for (const life of model.lives.slice(known)) {
    if (!colourOf.has(life.id)) colourOf.set(life.id, colourOf.size);
    life.index = colourOf.get(life.id);
    if (ownId(life.id)) mine.set(ownId(life.id), life.index);
  }
  record = line;
  trouble = null;
  if (!line.type) history.push({ batch: line.sched.length, held: model.last.holders.size / model.usableBlocks });
  history = history.slice(-STEPS_SHOWN);
  forgetColours();
  renderSoon();
}

// Several engines: the reader chooses the one to watch.
function addEngines(count) {
  const box = byId("which");
  for (let i = box.length; i < count; i++) box.add(new Option(`engine ${i}`, i));
  box.hidden = false;
}

// Only the colours of the present requests count; an old one may keep its own a while.
function forgetColours() {
  if (colourOf.size < 4096) return;
  for (const id of [...colourOf.keys()].slice(0, 2048)) if (!model.last.requests.has(id)) colourOf.delete(id);
}

// ---- the page

function showState() {
  const isBusy = model?.last.requests.size > 0;
  const now = isPaused ? ["paused", "paused"] : trouble ? ["lost", trouble] : isBusy ? ["busy", "working"] : ["idle", "idle"];
  [byId("state").dataset.is, byId("state").textContent] = now;
}

// At most ten pictures a second, one if the reader wants little motion: a fast engine makes more steps than that.
function renderSoon() {
  if (isWaitingForFrame) return;
  isWaitingForFrame = true;
  const draw = () => {
    isWaitingForFrame = false;
    render();
  };
  setTimeout(() => requestAnimationFrame(draw), calm.matches ? 1000 : 100);
}

export function render() {
  if (!model) return;
  showState();
  if (!byId("engine").clientWidth) return; // a small screen shows the chat now
  const view = { colours: readColours(byId("probe")), isDark: isDark(), chosen };
  const state = { ...model.last, step: model.records.length - 1, record };
  const isBusy = state.requests.size > 0;
  const { num_waiting: numWaiting } = record.queues;
  byId("step").textContent = number(record.step + 1);
  byId("tokens").textContent = isBusy ? `${number(record.budget.used)} of ${number(record.budget.tokens)}` : "–";
  byId("blocks-held").textContent = `${number(state.holders.size)} of ${number(model.usableBlocks)}`;
  byId("slots").textContent = slots(state);
  byId("num-running").textContent = state.running.length || "";
  byId("num-waiting").textContent = numWaiting || "";
  chips(byId("running"), state.running, state, view);
  chips(byId("waiting"), waitingIds(state), state, view, numWaiting);
  drawChart(byId("chart"), view);
  grid = drawBlocks(byId("blocks"), model, state, view);
  const unseen = model.usableBlocks - grid.shown;
  byId("unseen").textContent = unseen ? `${number(unseen)} more blocks were never held and are not drawn.` : "";
  if (byId("why-box").open) byId("why").replaceChildren(...whyLines());
}

// The engine's own order, which by priority is another than that of arrival; a very long queue comes without names.
function waitingIds(state) {
  const { waiting } = record.queues;
  return (waiting ?? []).filter((id) => state.requests.has(id));
}

const number = (value) => value.toLocaleString("en");

function slots(state) {
  const used = state.running.reduce((sum, id) => sum + state.requests.get(id).computed, 0);
  const reserved = [...state.tables.values()].reduce((sum, table) => sum + table.length * model.blockSize, 0);
  return reserved ? `${number(used)} of ${number(reserved)}` : "–";
}

// Chips are kept and changed, not made anew, so that one can be clicked and keeps the focus while steps go by.
function chips(box, ids, state, view, total = ids.length) {
  const old = new Map([...box.querySelectorAll(".chip")].map((chip) => [chip.dataset.id, chip]));
  const wanted = ids.map((id) => updateChip(old.get(id) ?? makeChip(id), id, state, view));
  if (total > ids.length) wanted.push(note(`${total} requests (too many for their names)`));
  if (!wanted.length) wanted.push(note("no request"));
  const isSame = wanted.length === box.children.length && wanted.every((child, i) => child === box.children[i]);
  if (!isSame) box.replaceChildren(...wanted);
}

function note(text) {
  const made = document.createElement("span");
  made.className = "none";
  made.textContent = text;
  return made;
}

function makeChip(id) {
  const chip = document.createElement("button");
  chip.className = "chip";
  chip.dataset.id = id;
  chip.onclick = () => {
    chosen = chosen === id ? null : id;
    render();
  };
  return chip;
}

function updateChip(chip, id, state, view) {
  const request = state.requests.get(id);
  const { computed, known, prompt } = request;
  const progress = !state.running.includes(id) ? (request.preemptions ? "preempted" : `prompt ${prompt}`)
    : computed < prompt ? `prompt ${computed}/${prompt}` : `+${known - prompt}`;
  chip.textContent = `${ownId(id) ? "you " : ""}${shortNames(id)} ${progress}`; // text, never HTML: an id may be a stranger's
  chip.title = `${id}: ${prompt} prompt tokens, ${known - prompt} generated, ${computed} computed`;
  chip.classList.toggle("mine", ownId(id) !== null);
  chip.setAttribute("aria-pressed", id === chosen);
  chip.style.setProperty("--owner", ownerColour({ index: colourOf.get(id) ?? 0 }, view));
  return chip;
}

// Of "chatcmpl-0f3a91c2...-1" the beginning of the random part tells requests apart, the last number tells the prompts of
// one request apart, and a number in front tells its answers apart.
const LONG_NAME = /(?<![0-9a-z])(?:(\d{1,4})_)?(?:chatcmpl|cmpl|resp)-([0-9a-z]{6})[0-9a-z-]*?(-\d{1,4})?(?![0-9a-z-])/g;

function shortNames(text) {
  return text.replace(LONG_NAME, (_, answer, name, prompt) =>
    name + (prompt && prompt !== "-0" ? prompt : "") + (answer ? `/${answer}` : ""));
}

function whyLines() {
  if (record.type) return [];
  const state = model.stateAt(model.records.length - 1);
  return explain(model, state).map(({ kind, text }) => {
    const line = document.createElement("li");
    line.className = kind;
    line.textContent = shortNames(text);
    return line;
  });
}

// Bars: the requests in each step. The line: the share of the blocks that are held.
function drawChart(canvas, view) {
  const { context, width } = prepare(canvas, CHART_HEIGHT);
  const column = width / STEPS_SHOWN;
  const most = scaleFor(Math.max(...history.map(({ batch }) => batch), 1), [4, 8, 16, 32, 64, 128, 256, 512]);
  const full = scaleFor(Math.max(...history.map(({ held }) => held), 0), [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]);
  const xOf = (i) => (STEPS_SHOWN - history.length + i) * column;
  const yOf = (share) => CHART_HEIGHT - 2 - share * (CHART_HEIGHT - 6);
  context.fillStyle = view.colours.line;
  context.fillRect(0, CHART_HEIGHT - 1, width, 1);
  context.fillStyle = view.colours.bar;
  history.forEach(({ batch }, i) => {
    const y = yOf(batch / most);
    context.fillRect(xOf(i), y, Math.max(column - 1, 1), CHART_HEIGHT - 1 - y);
  });
  context.strokeStyle = view.colours.prefill;
  context.lineWidth = 2;
  context.beginPath();
  history.forEach(({ held }, i) => context.lineTo(xOf(i) + column / 2, yOf(held / full)));
  context.stroke();
  byId("batch-top").textContent = `0–${most}`;
  byId("kv-top").textContent = `0–${Math.round(full * 100)} %`;
  const now = history.at(-1);
  const text = now ? `${now.batch} requests in the last step, ${(now.held * 100).toFixed(1)} % of the blocks held` : "no step yet";
  canvas.setAttribute("aria-label", `The last ${history.length} steps: ${text}.`);
}

function scaleFor(value, tops) {
  return tops.find((top) => value <= top) ?? value;
}

byId("pause").onclick = () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", isPaused);
  byId("pause").textContent = isPaused ? "Go on" : "Pause";
  if (isPaused) connection?.abort();
  else reconnect();
  render();
};
byId("which").onchange = () => {
  shown = byId("which").selectedIndex;
  [model, record, history, chosen] = [null, null, [], null];
  reconnect(); // a stream begins with a snapshot of every engine
};
byId("why-box").ontoggle = () => render();
byId("blocks").onclick = ({ offsetX, offsetY }) => {
  const block = Math.floor(offsetY / grid.cell) * grid.columns + Math.floor(offsetX / grid.cell) + 1;
  const held = model?.last.holders.get(block) ?? [];
  chosen = held.length ? held[(held.indexOf(chosen) + 1) % held.length] : null;
  render();
};
addEventListener("resize", () => renderSoon());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => renderSoon());
