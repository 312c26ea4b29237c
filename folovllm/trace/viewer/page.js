// page.js: the page around the pictures: one pane per trace, the texts beside them, keys, mouse and address. Milestone M2.
// Data comes inlined as JSON ({traces, divergence}); see folovllm/trace/view.py. The address keeps the place:
// #step=12&request=a, and theme=dark or theme=light.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const models = data.traces.map((trace) => new TraceModel(trace));
const numSteps = Math.max(...models.map((model) => model.records.length));
const divergence = data.divergence?.step ?? null;
const place = { step: divergence ?? 0, chosen: null, zoom: 0, firstRow: null };
const byId = (id) => document.getElementById(id);
const panes = models.map(makePane);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text; // never as HTML: a request id is the text of a stranger
  return made;
}

// ---- what changes the place

function goTo(change) {
  Object.assign(place, { firstRow: null }, change);
  place.step = Math.max(0, Math.min(place.step, numSteps - 1));
  const request = place.chosen === null ? "" : `&request=${encodeURIComponent(place.chosen)}`;
  const theme = document.documentElement.dataset.theme;
  history.replaceState(null, "", `#step=${place.step}${request}${theme ? `&theme=${theme}` : ""}`);
  render();
}

function readAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.get("theme")) document.documentElement.dataset.theme = wanted.get("theme");
  const step = Number.parseInt(wanted.get("step") ?? place.step, 10);
  goTo({ step: Number.isNaN(step) ? place.step : step, chosen: wanted.get("request") ?? place.chosen });
}

const KEYS = {
  ArrowRight: (event) => goTo({ step: place.step + (event.shiftKey ? 10 : 1) }),
  ArrowLeft: (event) => goTo({ step: place.step - (event.shiftKey ? 10 : 1) }),
  PageDown: () => goTo({ step: place.step + 100 }),
  PageUp: () => goTo({ step: place.step - 100 }),
  Home: () => goTo({ step: 0 }),
  End: () => goTo({ step: numSteps - 1 }),
  j: () => choose(1),
  k: () => choose(-1),
  d: () => divergence !== null && goTo({ step: divergence }),
  "+": () => goTo({ zoom: Math.min(zoom() * 1.5, 48) }),
  "-": () => goTo({ zoom: Math.max(zoom() / 1.5, 1) }),
  "?": () => (byId("help").open ? byId("help").close() : byId("help").showModal()),
};

// The next or previous request that is there at this step; from none, the first or last of all.
function choose(by) {
  const there = panes.flatMap(({ model }) => model.lives.filter((l) => l.first <= place.step && l.last >= place.step));
  const ids = [...new Set(there.map((life) => life.id))];
  const at = ids.indexOf(place.chosen);
  const next = at < 0 ? (by > 0 ? 0 : ids.length - 1) : at + by;
  if (ids.length) goTo({ chosen: ids[Math.max(0, Math.min(next, ids.length - 1))] });
}

// All steps of a short trace fit; of a long one, steps stay wide enough to see each.
function zoom() {
  const width = panes[0].canvases.gantt.clientWidth - LABEL;
  return place.zoom || Math.max(Math.min(Math.floor(width / numSteps), 30), 8);
}

// ---- panes

function makePane(model, i) {
  const root = byId("pane").content.firstElementChild.cloneNode(true);
  const part = (name) => root.querySelector(`[data-part=${name}]`);
  byId("panes").append(root);
  part("name").textContent = data.traces.length > 1 ? `${"ab"[i]}: ${model.name}` : model.name;
  part("config").textContent = describeConfig(model);
  const canvases = { overview: part("overview"), gantt: part("gantt"), blocks: part("blocks") };
  const pane = { model, part, canvases, drawn: null };
  wireMouse(pane);
  return pane;
}

function describeConfig({ config, blockSize, usableBlocks, records }) {
  const chunks = config.enable_chunked_prefill ? "chunked prefill" : "whole prompts";
  const cache = config.enable_prefix_caching ? "prefix caching" : "no prefix caching";
  const budget = `${config.max_num_batched_tokens} tokens and ${config.max_num_seqs} requests (seats) per step`;
  const blocks = `${usableBlocks} blocks of ${blockSize}`;
  return [count(records.length, "step"), config.batching, budget, blocks, chunks, cache].join(" · ");
}

function wireMouse(pane) {
  const { overview, gantt, blocks } = pane.canvases;
  const stepAt = (event) => Math.floor((event.offsetX / overview.clientWidth) * pane.model.records.length);
  overview.onpointerdown = (event) => goTo({ step: stepAt(event) });
  overview.onpointermove = (event) => event.buttons && goTo({ step: stepAt(event) });
  gantt.onclick = ({ offsetX, offsetY }) => {
    const { first, cell, rows } = pane.drawn.gantt;
    const life = rows[Math.floor((offsetY - AXIS) / ROW)];
    const step = offsetX < LABEL ? place.step : Math.min(first + Math.floor((offsetX - LABEL) / cell), numSteps - 1);
    goTo({ step, chosen: life?.id ?? place.chosen });
  };
  gantt.onwheel = (event) => {
    const { firstRow, numRows, rows } = pane.drawn.gantt;
    if (numRows <= rows.length || event.ctrlKey) return; // nothing to scroll: the page scrolls
    event.preventDefault();
    goTo({ firstRow: Math.max(0, Math.min(firstRow + Math.sign(event.deltaY) * 2, numRows - rows.length)) });
  };
  const blockAt = ({ offsetX, offsetY }) => {
    const { cell, columns } = pane.drawn.blocks;
    return Math.floor(offsetY / cell) * columns + Math.floor(offsetX / cell) + 1;
  };
  blocks.onclick = (event) => {
    const held = pane.state?.holders.get(blockAt(event)) ?? [];
    if (held.length) goTo({ chosen: held[(held.indexOf(place.chosen) + 1) % held.length] });
  };
  blocks.onpointermove = (event) => (blocks.title = pane.state ? describeBlock(pane.model, pane.state, blockAt(event)) : "");
}

function describeBlock(model, state, block) {
  if (block > model.usableBlocks) return "";
  const held = state.holders.get(block) ?? [];
  const filled = `${state.filled.get(block) ?? 0} of ${model.blockSize} slots filled`;
  if (held.length) return `block ${block}: held by ${held.join(", ")}; ${filled}; reference count ${held.length}`;
  return `block ${block}: free${model.cachedBlocks(state).includes(block) ? ", cached" : ""}`;
}

// ---- one step on the page

function render() {
  byId("slider").max = numSteps - 1;
  byId("slider").value = place.step;
  byId("step").textContent = numSteps ? `step ${place.step} of 0..${numSteps - 1}` : "no steps";
  const view = { ...place, divergence, zoom: zoom(), colours: readColours(byId("probe")), isDark: isDark() };
  document.body.dataset.cells = panes.reduce((cells, pane) => cells + renderPane(pane, view), 0);
}

function renderPane(pane, view) {
  const { model, part } = pane;
  const isOver = place.step >= model.records.length;
  part("over").hidden = !isOver;
  part("over").textContent = isOver ? `This trace ended after step ${model.records.length - 1}.` : "";
  const state = (pane.state = model.records.length ? model.stateAt(Math.min(place.step, model.records.length - 1)) : null);
  if (!state) return 0;
  pane.drawn = drawTrace(pane.canvases, model, state, view);
  part("summary").textContent = describeStep(state);
  part("pool").textContent = describePool(model, state);
  part("running").replaceChildren(...chips(pane, state.record.queues.running, view));
  part("waiting").replaceChildren(...waitingChips(pane, state, view));
  part("why").replaceChildren(...explain(model, state).map(whyLine));
  part("request").replaceChildren(...describeRequest(model, state));
  return pane.drawn.cells;
}

function describeStep({ step, record }) {
  const ms = (seconds) => `${Number((seconds * 1e3).toPrecision(3))} ms`;
  const spans = Object.entries(record.spans).map(([name, seconds]) => `${name} ${ms(seconds)}`).join(", ");
  const tokens = `${record.budget.used} of at most ${count(record.budget.tokens, "token")}`;
  return `Step ${step} computes ${tokens} for ${count(record.sched.length, "request")}. It takes ${ms(record.dur)} (${spans}).`;
}

function describePool(model, state) {
  const cached = model.cachedBlocks(state).length;
  const shared = [...state.holders.values()].filter((held) => held.length > 1).length;
  const free = model.usableBlocks - state.holders.size - cached;
  const guess = state.cachedIsProved ? "" : " (the trace counts another number: which ones are cached is a guess)";
  const unseen = model.usableBlocks - model.numShownBlocks;
  const { free: freeAfter, cached: cachedAfter } = state.record.pool;
  const counted = ` After the step, the trace counts ${cachedAfter} free and cached, ${freeAfter} free.`;
  return `${state.holders.size} held (${shared} shared), ${cached} free and cached, ${free} free${guess}.${counted}`
    + (unseen ? ` ${unseen} blocks that were never held are not drawn.` : "");
}

function chips({ model }, ids, view) {
  if (!ids.length) return [element("span", "none", "no request")];
  return ids.map((id) => {
    const chip = element("button", "chip", id);
    const life = model.lifeOf(id, place.step);
    if (life) chip.style.setProperty("--owner", ownerColour(life, view));
    chip.setAttribute("aria-pressed", id === place.chosen);
    chip.onclick = () => goTo({ chosen: id });
    return chip;
  });
}

function waitingChips(pane, { record }, view) {
  const { waiting, num_waiting: total } = record.queues;
  return waiting ? chips(pane, waiting, view) : [element("span", "none", `${total} requests (too many for their names)`)];
}

function whyLine({ request, kind, text }) {
  const line = element("li", kind, text);
  line.onclick = () => goTo({ chosen: request });
  if (request === place.chosen) line.classList.add("chosen");
  return line;
}

// The chosen request: its numbers, and its block table.
function describeRequest(model, state) {
  const life = place.chosen === null ? undefined : model.lifeOf(place.chosen, state.step);
  const note = (text) => [element("p", "none", text)];
  if (place.chosen === null) return note("Choose a request: press j, or click one.");
  if (!life) return note(`${place.chosen} has not arrived.`);
  const request = state.requests.get(life.id);
  if (!request) return note(`${life.id} finished in step ${life.last} (${life.reason}).`);
  const entry = state.record.sched.find((e) => e.req === life.id);
  const sampled = state.record.events.filter((e) => e[0] === "sample" && e[1] === life.id).flatMap((e) => e[2]);
  const facts = {
    request: life.id,
    state: state.running.includes(life.id) ? "running" : request.preemptions ? "waiting, preempted" : "waiting",
    "this step": entry ? `${entry.kind}, ${range(entry.start, entry.n)}` : "computes nothing",
    computed: `${request.computed} of ${request.known} known tokens`,
    prompt: count(request.prompt, "token"),
    generated: `${request.known - request.prompt} of at most ${count(request.maxTokens, "token")}`,
    sampled: sampled.length ? `token ${sampled.join(", ")}` : "no token in this step",
    "from the prefix cache": count(request.cached, "token"),
    preemptions: request.preemptions,
    priority: request.priority,
  };
  const list = element("dl");
  for (const [name, value] of Object.entries(facts)) list.append(element("dt", "", name), element("dd", "", value));
  return [list, blockTable(model, state, model.tableOf(state, life.id))];
}

function blockTable(model, state, blocks) {
  const size = model.blockSize;
  const rows = blocks.map((block, i) => [`${i * size}..${(i + 1) * size - 1}`, block,
    `${state.filled.get(block) ?? 0}/${size}`, state.holders.get(block).length]);
  const table = element("table");
  for (const row of [["tokens", "block", "filled", "ref"], ...rows]) {
    const line = element("tr");
    line.append(...row.map((cell) => element("td", "", cell)));
    table.append(line);
  }
  return blocks.length ? table : element("p", "none", "It holds no blocks.");
}

// ---- start

function describeDivergence({ step, a_only: a, b_only: b, sentence, config }) {
  const sides = [["Only in a", a], ["Only in b", b]].filter(([, phrases]) => phrases.length);
  return [
    `First divergence at step ${step}: ${sentence}.`,
    ...sides.map(([side, phrases]) => `${side}: ${phrases.join("; ")}.`),
    ...config.map((difference) => `Config differs in ${difference}.`),
  ].join(" ");
}

if (models.length > 1) {
  document.body.classList.add("two");
  byId("divergence").hidden = false;
  byId("verdict").textContent = data.divergence ? describeDivergence(data.divergence) : "The two traces are the same.";
  byId("to-divergence").hidden = !data.divergence;
}
byId("slider").oninput = (event) => goTo({ step: Number(event.target.value) });
byId("to-divergence").onclick = KEYS.d;
byId("ask").onclick = KEYS["?"];
addEventListener("keydown", (event) => {
  const act = KEYS[event.key];
  if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault(); // also the slider's own step
  act(event);
});
addEventListener("hashchange", readAddress);
addEventListener("resize", render);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
readAddress();
document.body.dataset.openedMs = Math.round(performance.now()); // since the browser began to load it;
