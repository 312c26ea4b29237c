// answer.js: one answer of the model, streamed from /v1/chat/completions, and its speed as this page sees it. Milestone M8.
"use strict";

import { ask, errorText, events } from "./client.js";

// Yields the chunks of the answer to `request`, which the engine knows under a name that contains `id`. Throws an Error if
// the server refuses, if the request fails, or if the stream breaks off.
export async function* chunksOf(request, id, signal) {
  const body = JSON.stringify({
    ...request,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  });
  const response = await ask("v1/chat/completions", { method: "POST", body, signal, id });
  if (!response.ok) throw Object.assign(new Error(await errorText(response)), { status: response.status });
  let isWhole = false;
  for await (const data of events(response)) {
    isWhole = data === "[DONE]";
    if (isWhole) continue; // the stream ends by itself
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  if (!isWhole) throw new Error("the server ended the stream too early");
}

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID would need HTTPS
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Times and tokens of an answer, as this page sees them: the way through the network is included. If the server gives
// several answers at once, the first one is measured, and all of them together at the end.
export class Measured {
  sent = performance.now();
  first = null; // when the first text came, and how many tokens had come by then
  tokensAtFirst = 0;
  last = null;
  numTokens = 0;
  numAnswers = 1;
  whole = null; // the usage of all answers, which comes last
  reason = null;

  // Takes a chunk, and returns the text that it adds to the first answer.
  take({ choices: [choice], usage }) {
    if (!choice) this.whole = usage;
    else this.numAnswers = Math.max(this.numAnswers, choice.index + 1);
    if (choice?.index !== 0) return "";
    this.numTokens = usage?.completion_tokens ?? this.numTokens;
    this.reason = choice.finish_reason ?? this.reason;
    const text = choice.delta?.content ?? "";
    if (text) this.note(performance.now());
    return text;
  }

  note(now) {
    this.last = now;
    if (this.first !== null) return;
    this.first = now;
    this.tokensAtFirst = this.numTokens;
  }

  describe(end = ENDS[this.reason]) {
    const { whole } = this;
    const parts = [];
    if (this.numTokens) parts.push(`${this.numTokens} token${this.numTokens === 1 ? "" : "s"}`);
    const later = this.numTokens - this.tokensAtFirst;
    if (later > 0 && this.last > this.first) parts.push(`${rate(later, this.last - this.first)} tok/s`);
    if (this.first !== null) parts.push(`first token after ${((this.first - this.sent) / 1000).toFixed(2)} s`);
    if (whole) parts.push(`${whole.prompt_tokens_details?.cached_tokens ?? 0} of ${whole.prompt_tokens} prompt tokens cached`);
    if (end) parts.push(end);
    if (whole && this.numAnswers > 1)
      parts.push(`${this.numAnswers} answers: ${rate(whole.completion_tokens, performance.now() - this.sent)} tok/s together`);
    return parts.join(" · ");
  }
}

const ENDS = { length: "ended at the limit of tokens", abort: "ended by the server" };

function rate(numTokens, ms) {
  return ((numTokens * 1000) / ms).toFixed(1);
}
