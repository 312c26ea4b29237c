// model.js: the records of a trace, replayed into the state of the engine at any step. Milestone M2.
// The same account as folovllm/trace/replay.py, plus what a picture needs: how full each block is, and the life of each
// request as runs of steps. It reads no page, so the live page (entrypoints/web/live.js) feeds it record by record with
// `push`.
"use strict";

const SNAPSHOT_EVERY = 64; // steps between two stored states: any state is at most so many records away

class TraceModel {
  constructor({ name, header, steps }) {
    this.name = name;
    this.config = header.config;
    this.blockSize = header.kv.block_size;
    this.usableBlocks = header.kv.usable_blocks;
    this.records = [];
    this.lives = []; // one per "add" event, in order: an id that comes back starts a new life
    this.newest = new Map(); // id -> its newest life
    this.maxBlock = 0; // the largest block that was ever held
    this.snapshots = []; // the states after step -1, 63, 127, ...
    this.last = newState();
    for (const record of steps) this.push(record);
  }

  push(record) {
    const step = this.records.length;
    const queues = step ? this.records[step - 1].queues : { waiting: [], running: [] };
    record.queues = { ...queues, ...record.queues }; // what did not change was left out
    this.records.push(record);
    if (step % SNAPSHOT_EVERY === 0) this.snapshots.push(copyState(this.last));
    this.begin(this.last, record);
    this.addToLives(step, this.last, record);
    this.finish(this.last, record);
  }

  // The state in the middle of `step`: the scheduler has decided, no token is sampled, no request has finished.
  stateAt(step) {
    const state = copyState(this.snapshots[Math.floor(step / SNAPSHOT_EVERY)]);
    for (let i = step - (step % SNAPSHOT_EVERY); i < step; i++) {
      this.begin(state, this.records[i]);
      this.finish(state, this.records[i]);
    }
    this.begin(state, this.records[step]);
    return Object.assign(state, { step, record: this.records[step] });
  }

  begin(state, record) {
    Object.assign(state, { preempted: [], freeBeforePreemption: 0, wanted: 0, copies: new Map() });
    for (const event of record.events.slice(0, record.planned)) {
      if (event[0] === "preempt" && !state.preempted.length) {
        state.freeBeforePreemption = this.usableBlocks - state.holders.size;
        state.wanted = this.blocksWanted(state, record);
      }
      this.apply(state, event);
      if (event[0] === "preempt") state.preempted.push(event[1]);
      if (event[0] === "copy") state.copies.set(event[1], event);
    }
    state.runningBefore = [...state.running];
    state.waitingBefore = [...state.waiting];
    for (const entry of record.sched) this.run(state, entry);
  }

  finish(state, record) {
    const after = record.events.slice(record.planned);
    if (after.some((event) => event[0] === "finish" && event[2] === "error"))
      for (const entry of record.sched) // a step that failed has filled nothing
        for (const block of this.tableOf(state, entry.req).slice(Math.floor(entry.start / this.blockSize)))
          state.filled.set(block, 0);
    for (const event of after) this.apply(state, event);
    if (this.config.enable_prefix_caching && record.pool.cached === 0) // e.g. after a reset of the prefix cache
      for (const block of state.filled.keys()) if (!state.holders.has(block)) state.filled.delete(block);
    // Only if the two counts agree, the records prove which free blocks are cached.
    state.cachedIsProved = this.cachedBlocks(state).length === record.pool.cached;
  }

  apply(state, [kind, id, ...rest]) {
    const request = state.requests.get(id);
    if (kind === "add") {
      const [prompt, maxTokens, priority] = rest;
      state.requests.set(id, { id, prompt, maxTokens, priority, known: prompt, computed: 0, cached: 0, preemptions: 0 });
      state.waiting.push(id);
    } else if (kind === "preempt" || kind === "requeue") {
      leaveQueues(state, id);
      state.waiting.unshift(id);
      if (request) Object.assign(request, { computed: 0, cached: 0, preemptions: request.preemptions + 1 });
    } else if (kind === "hit" || kind === "alloc") {
      if (kind === "alloc") for (const block of rest[0]) state.filled.set(block, 0);
      this.take(state, id, rest[0]);
    } else if (kind === "free") {
      release(state, id);
    } else if (kind === "sample") {
      if (request) request.known += rest[0].length ?? rest[0]; // the token ids or, in a live trace, their number
    } else if (kind === "finish") {
      leaveQueues(state, id);
      state.requests.delete(id);
    } else if (kind === "cached") { // the snapshot that a live trace begins with: free blocks that can still be hit
      for (const block of rest[0]) {
        state.filled.set(block, this.blockSize);
        this.maxBlock = Math.max(this.maxBlock, block);
      }
    }
  }

  run(state, entry) {
    const { req: id, start, n, cached } = entry;
    if (!state.running.includes(id)) {
      leaveQueues(state, id);
      state.running.push(id);
    }
    if (entry.table) { // written only where it is not what the events say: a fault that the lint reports
      release(state, id);
      this.take(state, id, entry.table);
    }
    const request = state.requests.get(id);
    if (request) request.computed = start + n;
    if (request && cached) request.cached = cached;
    const table = this.tableOf(state, id);
    for (let i = Math.floor(start / this.blockSize); i * this.blockSize < start + n && i < table.length; i++)
      state.filled.set(table[i], Math.min(start + n - i * this.blockSize, this.blockSize));
  }

  take(state, id, blocks) {
    state.tables.set(id, [...this.tableOf(state, id), ...blocks]);
    for (const block of blocks) {
      state.holders.set(block, [...(state.holders.get(block) ?? []), id]);
      this.maxBlock = Math.max(this.maxBlock, block);
    }
  }

  // The others were never held. A real cache has thousands of them.
  get numShownBlocks() {
    return Math.min(this.usableBlocks, Math.max(this.maxBlock + 1, 32));
  }

  tableOf(state, id) {
    return state.tables.get(id) ?? [];
  }

  // Blocks that the running requests lack in this step, as far as the record proves it (a lower bound).
  blocksWanted(state, record) {
    const ends = new Map(record.sched.map((entry) => [entry.req, entry.start + entry.n]));
    let wanted = 0;
    for (const id of state.running) {
      const request = state.requests.get(id);
      const end = ends.get(id) ?? (request && request.known - request.computed === 1 ? request.known : 0);
      wanted += Math.max(Math.ceil(end / this.blockSize) - this.tableOf(state, id).length, 0);
    }
    return wanted;
  }

  cachedBlocks(state) {
    if (!this.config.enable_prefix_caching) return [];
    const isCached = ([block, slots]) => slots === this.blockSize && !state.holders.has(block);
    return [...state.filled].filter(isCached).map(([block]) => block);
  }

  // ---- the Gantt chart's rows

  addToLives(step, state, record) {
    record.events.forEach(([kind, id, value], i) => {
      if (kind === "add") {
        const life = { id, index: this.lives.length, first: step, last: Infinity, reason: null, runs: [], marks: [] };
        this.lives.push(life);
        this.newest.set(id, life);
        extend(life, step, "waiting", true);
      }
      const life = this.newest.get(id);
      if (!life) return;
      if (kind === "preempt" || kind === "requeue") extend(life, step, "preempted", true);
      if (["preempt", "hit", "finish"].includes(kind)) life.marks.push({ step, kind });
      if (kind === "finish") {
        const last = i >= record.planned ? step : Math.max(life.first, step - 1); // or it ended before this step
        Object.assign(life, { last, reason: value });
        Object.assign(life.runs.at(-1), { open: false, to: life.last });
      }
      if (i === record.planned - 1) this.addEntries(step, state, record);
    });
    if (!record.planned) this.addEntries(step, state, record);
  }

  addEntries(step, state, record) {
    const kinds = new Map(state.runningBefore.map((id) => [id, "idle"]));
    for (const entry of record.sched) {
      const known = state.requests.get(entry.req)?.known ?? 0;
      const isPart = entry.kind === "prefill" && entry.start + entry.n < known;
      kinds.set(entry.req, isPart ? "chunk" : entry.kind);
    }
    for (const [id, kind] of kinds) if (this.newest.has(id)) extend(this.newest.get(id), step, kind, false);
  }

  // The life that `id` has at `step`.
  lifeOf(id, step) {
    return this.lives.findLast((life) => life.id === id && life.first <= step);
  }
}

function newState() {
  return {
    requests: new Map(), // id -> the unfinished request
    waiting: [],
    running: [],
    tables: new Map(), // id -> blocks, in the order of its tokens
    holders: new Map(), // block -> ids
    filled: new Map(), // block -> slots with computed K/V; a freed block keeps them until it is allocated again
    cachedIsProved: true,
  };
}

function copyState(state) {
  const copy = { ...state, waiting: [...state.waiting], running: [...state.running] };
  copy.requests = new Map([...state.requests].map(([id, request]) => [id, { ...request }]));
  for (const name of ["tables", "holders", "filled"]) copy[name] = new Map(state[name]); // lists are replaced, not changed
  return copy;
}

function leaveQueues(state, id) {
  for (const name of ["waiting", "running"]) {
    const at = state[name].indexOf(id);
    if (at >= 0) state[name].splice(at, 1);
  }
}

function release(state, id) {
  for (const block of state.tables.get(id) ?? []) {
    const held = state.holders.get(block);
    const at = held.indexOf(id);
    const others = held.filter((_, i) => i !== at);
    if (others.length) state.holders.set(block, others);
    else state.holders.delete(block);
  }
  state.tables.delete(id);
}

// Adds `step` to the runs of a life. An open run (a wait) goes on until another one begins.
function extend(life, step, kind, open) {
  const run = life.runs.at(-1);
  if (run?.kind === kind) {
    run.to = step;
    return;
  }
  if (run?.open) Object.assign(run, { open: false, to: step - 1 });
  if (run && run.to < run.from) life.runs.pop(); // it waited for no step
  life.runs.push({ kind, from: step, to: step, open });
}
