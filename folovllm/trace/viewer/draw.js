// draw.js: one step of a trace as pictures on three canvases. Milestone M2. Draws only the steps and rows in sight, so
// the cost of a picture does not depend on the length of the trace. It keeps nothing and reads no page, so the live page
// (entrypoints/web/live.js) draws its blocks with it after every record.
//   canvases  {overview, gantt, blocks}
//   model     a TraceModel;   state   model.stateAt(step)
//   view      {colours, chosen: id or null, divergence: step or null, zoom: pixels per step, firstRow}
// Returns what was drawn where: {gantt: {first, cell, rows}, blocks: {columns, cell}, cells}.
"use strict";

const ROW = 20; // pixels per request
const LABEL = 92; // pixels for the names of the requests
const AXIS = 18;
const MAX_GRID_HEIGHT = 300;
const BLOCK_SIZES = [34, 28, 22, 16, 12, 8, 6, 4]; // the largest that fits is taken

function drawTrace(canvases, model, state, view) {
  drawOverview(canvases.overview, model, state, view);
  const gantt = drawGantt(canvases.gantt, model, state, view);
  const blocks = drawBlocks(canvases.blocks, model, state, view);
  return { gantt, blocks, cells: gantt.cells + blocks.cells };
}

// Neighbours in the order of arrival get colours that are far apart.
function ownerColour(life, view) {
  return `hsl(${(life.index * 137.5) % 360} ${view.isDark ? "48% 58%" : "58% 52%"})`;
}

// Fits the canvas to its place and to the pixels of the screen. Returns its context, in CSS pixels.
function prepare(canvas, height) {
  const width = canvas.clientWidth;
  const ratio = globalThis.devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  return { context, width };
}

// The whole trace: tokens per step against the budget. Each column of pixels shows the fullest of its steps.
function drawOverview(canvas, model, state, view) {
  const { context, width } = prepare(canvas, 44);
  const { records } = model;
  const perStep = width / records.length;
  const budget = state.record.budget.tokens;
  const top = records.reduce((most, r) => Math.max(most, r.budget.used), 1);
  for (let x = 0; x < width; x++) {
    const from = Math.floor(x / perStep);
    let used = 0;
    for (let i = from; i < Math.max(from + 1, Math.floor((x + 1) / perStep)) && i < records.length; i++)
      used = Math.max(used, records[i].budget.used);
    const height = Math.max((40 * used) / top, used ? 1 : 0);
    context.fillStyle = view.colours[used >= budget ? "chunk" : "bar"];
    context.fillRect(x, 42 - height, 1, height);
  }
  const mark = (step, colour) => {
    context.fillStyle = view.colours[colour];
    context.fillRect(Math.min(Math.floor((step + 0.5) * perStep), width - 2), 0, 2, 44);
  };
  if (view.divergence !== null) mark(view.divergence, "divergence");
  mark(state.step, "cursor");
  canvas.setAttribute("aria-label", `Tokens per step, at most ${top}, of a budget of ${budget}.`);
}

// Steps to the right, requests downwards: those of the steps in sight or, if they are too many, of this step.
function drawGantt(canvas, model, state, view) {
  const maxRows = 16;
  const columns = Math.max(Math.floor((canvas.clientWidth - LABEL) / view.zoom), 1);
  const numSteps = model.records.length;
  const first = Math.max(Math.min(state.step - Math.floor(columns / 2), numSteps - columns), 0);
  const end = Math.min(first + columns, numSteps);
  const inSight = model.lives.filter((life) => life.first < end && life.last >= first);
  const isThere = (life) => life.first <= state.step && life.last >= state.step;
  const alive = inSight.length > maxRows ? inSight.filter(isThere) : inSight;
  const firstRow = firstRowInSight(alive, maxRows, view);
  const rows = alive.slice(firstRow, firstRow + maxRows);
  const { context, width } = prepare(canvas, AXIS + Math.max(rows.length, 1) * ROW + 16);
  const xOf = (step) => LABEL + (step - first) * view.zoom;

  let cells = 0;
  drawAxis(context, first, end, xOf, view);
  rows.forEach((life, i) => {
    const y = AXIS + i * ROW;
    drawName(context, life, y, width, view);
    for (const run of life.runs) cells += drawRun(context, run, first, end, xOf, y, view);
    cells += drawMarks(context, model, life, first, end, xOf, y, view);
  });
  const bottom = AXIS + rows.length * ROW;
  outline(context, xOf(state.step), AXIS - 2, view.zoom, bottom - AXIS + 4, view.colours.cursor);
  if (view.divergence !== null && view.divergence >= first && view.divergence < end) {
    context.fillStyle = view.colours.divergence;
    context.fillRect(xOf(view.divergence) - 1, 0, 2, bottom + 2);
  }
  context.fillStyle = view.colours.faint;
  const hidden = alive.length - rows.length;
  if (hidden) context.fillText(`${hidden} more requests: scroll here, or press j and k`, LABEL, bottom + 9);
  canvas.setAttribute("aria-label", `Steps ${first} to ${end - 1}, requests ${rows.map((life) => life.id).join(", ")}.`);
  return { first, cell: view.zoom, rows, firstRow, cells, numRows: alive.length };
}

// Where the user scrolled to, or so that the chosen request is in sight.
function firstRowInSight(alive, maxRows, view) {
  const chosen = alive.findIndex((life) => life.id === view.chosen);
  const row = view.firstRow ?? (chosen < maxRows ? 0 : chosen - maxRows / 2);
  return Math.max(Math.min(row, alive.length - maxRows), 0);
}

function drawAxis(context, first, end, xOf, view) {
  const every = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((n) => n * view.zoom >= 34) ?? 2000;
  context.fillStyle = view.colours.faint;
  context.textAlign = "center";
  for (let step = Math.ceil(first / every) * every; step < end; step += every)
    context.fillText(step, xOf(step) + view.zoom / 2, AXIS / 2);
  context.textAlign = "left";
}

function drawName(context, life, y, width, view) {
  if (life.id === view.chosen) {
    context.fillStyle = view.colours.chosen;
    context.fillRect(0, y, width, ROW);
  }
  context.fillStyle = ownerColour(life, view);
  context.fillRect(2, y + 4, 10, ROW - 8);
  context.fillStyle = view.colours.text;
  context.fillText(life.id.length > 11 ? `${life.id.slice(0, 10)}…` : life.id, 16, y + ROW / 2);
}

function drawRun(context, run, first, end, xOf, y, view) {
  const from = Math.max(run.from, first);
  const to = Math.min(run.open ? end - 1 : run.to, end - 1);
  if (to < from) return 0;
  const isWait = ["waiting", "preempted", "idle"].includes(run.kind);
  const [top, height] = isWait ? [y + ROW / 2 - 3, 6] : [y + 3, ROW - 6];
  context.fillStyle = view.colours[run.kind];
  const gap = view.zoom >= 8 ? 1 : 0;
  if (isWait || !gap) {
    context.fillRect(xOf(from), top, (to - from + 1) * view.zoom - gap, height);
    return 1;
  }
  for (let step = from; step <= to; step++) context.fillRect(xOf(step), top, view.zoom - gap, height);
  return to - from + 1;
}

// Token counts where there is room for them, and what happened to the request.
function drawMarks(context, model, life, first, end, xOf, y, view) {
  let drawn = 0;
  if (view.zoom >= 20) {
    context.fillStyle = view.colours.onColour;
    context.textAlign = "center";
    for (let step = Math.max(first, life.first); step < Math.min(end, life.last + 1); step++) {
      const entry = model.records[step].sched.find((e) => e.req === life.id);
      if (entry) context.fillText(entry.n, xOf(step) + view.zoom / 2, y + ROW / 2 + 0.5);
      drawn++;
    }
    context.textAlign = "left";
  }
  for (const { step, kind } of life.marks) {
    if (step < first || step >= end || kind === "finish") continue;
    context.fillStyle = view.colours[kind === "hit" ? "hit" : "preempted"];
    if (kind === "hit") context.fillRect(xOf(step), y + ROW - 4, Math.max(view.zoom - 1, 3), 3);
    else triangle(context, xOf(step) + view.zoom / 2, y + 4);
    drawn++;
  }
  return drawn;
}

function triangle(context, x, y) {
  context.beginPath();
  context.moveTo(x - 4, y - 2);
  context.lineTo(x + 4, y - 2);
  context.lineTo(x, y + 5);
  context.fill();
}

function outline(context, x, y, width, height, colour) {
  context.strokeStyle = colour;
  context.lineWidth = 2;
  context.strokeRect(x, y, Math.max(width - 1, 2), height);
}

// ---- the blocks

function drawBlocks(canvas, model, state, view) {
  const width = canvas.clientWidth;
  const shown = model.numShownBlocks;
  const fits = (size) => Math.ceil(shown / Math.max(Math.floor(width / size), 1)) * size <= MAX_GRID_HEIGHT;
  const cell = BLOCK_SIZES.find(fits) ?? BLOCK_SIZES.at(-1);
  const columns = Math.max(Math.floor(width / cell), 1);
  const { context } = prepare(canvas, Math.ceil(shown / columns) * cell);
  const cached = new Set(model.cachedBlocks(state));
  const lives = new Map([...state.requests.keys()].map((id) => [id, model.lifeOf(id, state.step)]));
  for (let block = 1; block <= shown; block++) {
    const [x, y] = [((block - 1) % columns) * cell, Math.floor((block - 1) / columns) * cell];
    const held = state.holders.get(block) ?? [];
    const size = cell - (cell > 6 ? 2 : 1);
    const share = (state.filled.get(block) ?? 0) / model.blockSize;
    if (held.length) drawHeld(context, x, y, size, held.map((id) => lives.get(id)), share, view);
    else drawFree(context, x, y, size, cached.has(block), state.cachedIsProved, view);
    if (held.includes(view.chosen)) outline(context, x + 1, y + 1, size - 1, size - 2, view.colours.cursor);
    const isOnColour = held.length > 1 || (held.length === 1 && (share > 0.5 || !view.isDark)); // else on the dark page
    if (cell >= 22) drawBlockText(context, x, y, size, block, held, view.colours[isOnColour ? "onBlock" : "faint"], view);
  }
  const sum = `${state.holders.size} blocks held, ${cached.size} free and cached, `;
  canvas.setAttribute("aria-label", `${sum}${model.usableBlocks - state.holders.size - cached.size} free.`);
  return { columns, cell, shown, cells: shown };
}

// A stripe per holder; the filled slots in full colour, from the bottom upwards.
function drawHeld(context, x, y, size, lives, share, view) {
  const stripe = size / lives.length;
  lives.forEach((life, i) => {
    context.fillStyle = life ? ownerColour(life, view) : view.colours.text;
    context.globalAlpha = 0.3;
    context.fillRect(x + i * stripe, y, stripe, size);
    context.globalAlpha = 1;
    context.fillRect(x + i * stripe, y + size * (1 - share), stripe, size * share);
  });
}

function drawFree(context, x, y, size, isCached, isProved, view) {
  context.strokeStyle = view.colours[isCached ? "cached" : "line"];
  context.lineWidth = 1;
  context.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
  if (!isCached) return;
  context.globalAlpha = isProved ? 0.8 : 0.3;
  context.beginPath(); // hatched
  for (let d = size / 3; d < 2 * size; d += Math.max(size / 3, 4)) {
    context.moveTo(x + Math.max(d - size, 0), y + Math.min(d, size));
    context.lineTo(x + Math.min(d, size), y + Math.max(d - size, 0));
  }
  context.stroke();
  context.globalAlpha = 1;
}

function drawBlockText(context, x, y, size, block, held, colour, view) {
  const isShared = held.length > 1;
  if (isShared) {
    context.globalAlpha = 0.7; // a ground that the stripes do not show through
    context.fillStyle = view.colours.ground;
    context.fillRect(x + 4, y + 4, size - 8, size - 8);
    context.globalAlpha = 1;
  }
  context.fillStyle = colour;
  context.font = "10px system-ui, sans-serif";
  context.textAlign = "center";
  context.fillText(block, x + size / 2, y + size / 2 - (isShared ? 5 : 0));
  context.font = "bold 10px system-ui, sans-serif";
  if (isShared) context.fillText(`×${held.length}`, x + size / 2, y + size / 2 + 6);
}
