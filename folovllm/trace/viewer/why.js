// why.js: the decisions of a step as sentences. Each sentence says only what the records prove. Milestone M2.
"use strict";

const MAX_NAMES = 12;

// [{request, kind, text}], in the order in which the scheduler decides.
function explain(model, state) {
  const { record } = state;
  const decodes = record.sched.filter((e) => e.kind === "decode" && state.runningBefore.includes(e.req));
  const others = record.sched.filter((e) => !decodes.includes(e));
  return [
    ...eventSentences(record.events.slice(0, record.planned), state),
    ...preemptionSentences(model, state),
    ...decodeSentence(decodes),
    ...others.map((entry) => ({ request: entry.req, kind: entry.kind, text: entrySentence(model, state, entry) })),
    ...idleSentence(state),
    ...waitingSentence(model, state),
    ...eventSentences(record.events.slice(record.planned), state),
  ];
}

function count(n, noun) {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}

function names(ids) {
  return ids.slice(0, MAX_NAMES).join(", ") + (ids.length > MAX_NAMES ? ` and ${ids.length - MAX_NAMES} more` : "");
}

function range(start, n) {
  return n === 1 ? `token ${start}` : `tokens ${start}..${start + n - 1}`;
}

function eventSentences(events) {
  const blocksOf = new Map(events.filter((e) => e[0] === "free").map((e) => [e[1], e[2].length]));
  return events.flatMap(([kind, request, value, limit]) => {
    if (kind === "add")
      return { request, kind, text: `${request} arrives with ${count(value, "prompt token")} and may generate ${limit}.` };
    if (kind === "requeue")
      return { request, kind: "preempted", text: `${request} was preempted between two steps, to reset the prefix cache.` };
    if (kind !== "finish") return [];
    const freed = blocksOf.has(request) ? ` and releases ${count(blocksOf.get(request), "block")}` : "";
    return { request, kind, text: `${request} finishes (${value})${freed}.` };
  });
}

function preemptionSentences(model, state) {
  const freed = new Map(state.record.events.filter((e) => e[0] === "free").map((e) => [e[1], e[2].length]));
  const { wanted, freeBeforePreemption: free } = state;
  return state.preempted.map((request, i) => {
    const why = i === 0 && wanted > free
      ? ` The running requests need at least ${count(wanted, "more block")}; ${free} ${free === 1 ? "was" : "were"} free.`
      : "";
    const text = `${request} is preempted and releases ${count(freed.get(request) ?? 0, "block")}.${why}`;
    return { request, kind: "preempted", text };
  });
}

function decodeSentence(decodes) {
  if (!decodes.length) return [];
  const ids = decodes.map((entry) => entry.req);
  const text = ids.length === 1
    ? `${ids[0]} runs and computes its one missing token (${range(decodes[0].start, 1)}).`
    : `${names(ids)} run and compute one missing token each.`;
  return [{ request: ids[0], kind: "decode", text }];
}

function entrySentence(model, state, entry) {
  const { req, start, n } = entry;
  const request = state.requests.get(req);
  const known = request?.known ?? start + n;
  const verb = state.runningBefore.includes(req) ? "runs and goes on with" : admission(model, state, entry, request);
  const end = start + n < known ? `, ${known - start - n} remain: ${limitOf(model, state.record, n)}.` : ".";
  return `${req} ${verb} ${range(start, n)} of the ${known} it knows${end}`;
}

function admission(model, state, entry, request) {
  const copy = state.copies.get(entry.req);
  const inBlocks = (entry.cached ?? 0) - (copy ? copy[4] : 0);
  const hits = [
    inBlocks ? `${count(inBlocks, "token")} (${count(inBlocks / model.blockSize, "block")}) from the prefix cache` : "",
    copy ? `${count(copy[4], "token")} copied from block ${copy[2]}` : "",
  ].filter(Boolean);
  const again = request?.preemptions ? "comes back after its preemption" : "is admitted";
  return `${again}${hits.length ? `, has ${hits.join(" and ")},` : ""} and computes`;
}

// Why a request got only `n` tokens.
function limitOf(model, record, n) {
  const threshold = model.config.long_prefill_token_threshold;
  if (threshold > 0 && n === threshold) return `long_prefill_token_threshold allows ${threshold} at once`;
  if (record.budget.used === record.budget.tokens) return `the budget of ${record.budget.tokens} tokens is used up`;
  return "the record does not say why it got no more";
}

function idleSentence(state) {
  const { record } = state;
  const scheduled = new Set(record.sched.map((entry) => entry.req));
  const idle = state.runningBefore.filter((id) => !scheduled.has(id));
  if (!idle.length) return [];
  const isUsedUp = record.budget.used === record.budget.tokens;
  const why = isUsedUp ? `the budget of ${record.budget.tokens} tokens is used up` : "the record does not say why";
  return [{ request: idle[0], kind: "idle", text: `${names(idle)} ${idle.length === 1 ? "gets" : "get"} no token: ${why}.` }];
}

// Why the first request of the queue still waits. The others wait behind it: no request overtakes the head.
function waitingSentence(model, state) {
  const head = state.record.queues.waiting?.[0];
  if (head === undefined || !state.waitingBefore.includes(head) || state.running.includes(head)) return [];
  const behind = state.record.queues.num_waiting - 1;
  const rest = behind > 0 ? ` ${count(behind, "more request")} ${behind === 1 ? "waits" : "wait"} behind it.` : "";
  return [{ request: head, kind: "waiting", text: `${head} waits: ${reasonToWait(model, state, head)}.${rest}` }];
}

function reasonToWait(model, state, head) {
  const { record, running, runningBefore } = state;
  const { config } = model;
  if (state.preempted.length) return "a step that preempts admits no request";
  if (config.batching === "static" && runningBefore.length) return "a static batch admits only when no request runs";
  const { seqs } = record.budget;
  if (running.length >= seqs) return seqs === 1 ? "the only seat is taken" : `all ${seqs} seats are taken`;
  const left = record.budget.tokens - record.budget.used;
  if (left <= 0) return `the budget of ${record.budget.tokens} tokens is used up`;
  const known = state.requests.get(head).known;
  const unlessHit = config.enable_prefix_caching ? "without a prefix hit, " : ""; // the records do not say what it would hit
  if (!config.enable_chunked_prefill && known > left)
    return `${unlessHit}its ${count(known, "token")} must be computed whole, and the budget has ${left} left`;
  const limit = config.long_prefill_token_threshold > 0 ? config.long_prefill_token_threshold : Infinity;
  const atOnce = config.reserve_full_sequence ? known : Math.min(known, left, limit);
  const needed = Math.ceil(atOnce / model.blockSize);
  const free = model.usableBlocks - state.holders.size;
  const needs = `${unlessHit}its next ${count(atOnce, "token")} need ${count(needed, "block")}`;
  if (needed > free) return `${needs}, and ${free} ${free === 1 ? "is" : "are"} free`;
  return "the record does not say why";
}
