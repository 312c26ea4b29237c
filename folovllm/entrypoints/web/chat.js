// chat.js: the conversation. Answers are streamed from /v1/chat/completions, and their speed is measured here. Milestone M8.
"use strict";

import { ask, errorText, events, useKey } from "./client.js";
import { colourOfMine, markMine, reconnect, render, watchEngine } from "./live.js";

const byId = (id) => document.getElementById(id);
let conversation = []; // {role, content}: what the next request sends
let modelName = ""; // "" is the one model that the server has
let running = null; // the AbortController of the answer that is being streamed

// ---- the server's answer

async function send(text) {
  const said = { role: "user", content: text };
  const thread = conversation; // a new conversation is another list
  show("user", text);
  const answer = show("assistant", "");
  const measured = new Measured();
  const { signal } = (running = new AbortController());
  const keep = () => thread.push(said, { role: "assistant", content: answer.text.textContent });
  setBusy(true);
  try {
    await stream([...thread, said], answer, measured, signal);
    keep();
    finish(answer, measured.describe());
  } catch (error) {
    if (signal.aborted) {
      keep();
      finish(answer, measured.describe("stopped"));
    } else {
      finish(answer, error instanceof TypeError ? "no connection to the server" : error.message, true);
      giveBack(text, answer);
    }
  }
  running = null;
  setBusy(false);
}

async function stream(messages, answer, measured, signal) {
  const system = byId("system").value.trim();
  const body = {
    ...(modelName ? { model: modelName } : {}),
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    ...numbers(),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const id = newId();
  markMine(id); // the server takes the X-Request-Id into the request's name, also in the live trace
  const response = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal, id });
  if (response.status === 401) askForKey();
  if (!response.ok) throw new Error(await errorText(response));
  let isWhole = false;
  for await (const data of events(response)) {
    if ((isWhole = data === "[DONE]")) continue; // the stream ends by itself
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    takeChunk(chunk, answer, measured);
    answer.root.style.setProperty("--owner", colourOfMine(id) ?? "var(--line)");
  }
  if (!isWhole) throw new Error("the server ended the stream too early");
}

function takeChunk(chunk, answer, measured) {
  const choice = chunk.choices[0];
  const text = choice?.delta?.content ?? "";
  measured.take(text, chunk.usage, choice?.finish_reason);
  if (!text) return;
  keepInSight(() => {
    answer.text.append(text); // as text: whatever the model writes is never HTML
    answer.foot.textContent = measured.describe();
  });
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // randomUUID would need HTTPS
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Empty fields are left out: the server then decides.
function numbers() {
  const read = (id) => byId(id).value.trim();
  const sent = {};
  if (read("temperature")) sent.temperature = Number(read("temperature"));
  if (read("max-tokens")) sent.max_tokens = Number(read("max-tokens"));
  return sent;
}

// Times and tokens of one answer, as this page sees them: the way through the network is included.
class Measured {
  sent = performance.now();
  first = null; // when the first text came, and how many tokens had come by then
  tokensAtFirst = 0;
  last = null;
  usage = null;
  reason = null;

  take(text, usage, reason) {
    this.usage = usage ?? this.usage;
    this.reason = reason ?? this.reason;
    if (!text) return;
    this.last = performance.now();
    if (this.first !== null) return;
    this.first = this.last;
    this.tokensAtFirst = this.usage?.completion_tokens ?? 1;
  }

  describe(end = null) {
    const { usage } = this;
    const parts = [];
    if (usage) parts.push(`${usage.completion_tokens} token${usage.completion_tokens === 1 ? "" : "s"}`);
    const later = (usage?.completion_tokens ?? 0) - this.tokensAtFirst;
    if (later > 0 && this.last > this.first) parts.push(`${((later * 1000) / (this.last - this.first)).toFixed(1)} tok/s`);
    if (this.first !== null) parts.push(`first token after ${((this.first - this.sent) / 1000).toFixed(2)} s`);
    if (usage) parts.push(`${usage.prompt_tokens_details?.cached_tokens ?? 0} of ${usage.prompt_tokens} prompt tokens cached`);
    const ends = { length: "ended at the limit of tokens", abort: "ended by the server" };
    end ??= ends[this.reason];
    return [...parts, ...(end ? [end] : [])].join(" · ");
  }
}

// ---- the page

function show(role, text) {
  const root = document.createElement("article");
  root.className = `message ${role}`;
  root.setAttribute("aria-label", role === "user" ? "you" : "the model");
  const parts = { root, text: document.createElement("div"), foot: document.createElement("div") };
  parts.text.className = "text";
  parts.text.textContent = text;
  parts.foot.className = "foot";
  root.append(parts.text);
  if (role === "assistant") {
    root.append(parts.foot);
    root.classList.add("running");
  }
  byId("invitation").hidden = true;
  byId("messages").append(root);
  byId("messages").scrollTop = byId("messages").scrollHeight;
  return parts;
}

function finish(answer, foot, isFailed = false) {
  answer.root.classList.remove("running");
  answer.root.classList.toggle("failed", isFailed);
  keepInSight(() => (answer.foot.textContent = foot));
}

// A message that got no answer can be sent again.
function giveBack(text, answer) {
  if (!answer.text.textContent && !byId("prompt").value) byId("prompt").value = text;
}

// Follows the text that `change` adds, unless the reader has scrolled up.
function keepInSight(change) {
  const box = byId("messages");
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 20;
  change();
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

function setBusy(isBusy) {
  const hadFocus = document.activeElement;
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
  byId("messages").setAttribute("aria-busy", isBusy);
  if (hadFocus === byId("send")) byId("stop").focus();
  if (hadFocus === byId("stop")) byId("prompt").focus();
}

function askForKey() {
  byId("key-row").hidden = false;
  byId("key").focus();
}

function startAnew() {
  running?.abort();
  conversation = [];
  byId("messages").replaceChildren();
  byId("invitation").hidden = false;
  byId("prompt").focus();
}

function submit() {
  const text = byId("prompt").value.trim();
  if (!text || running) return;
  byId("prompt").value = "";
  send(text);
}

function showView(view) {
  document.body.dataset.view = view;
  byId("show-chat").setAttribute("aria-pressed", view === "chat");
  byId("show-engine").setAttribute("aria-pressed", view === "engine");
  render();
}

async function learnModelName() {
  const response = await ask("v1/models").catch(() => null);
  if (response?.status === 401) askForKey();
  if (!response?.ok) return;
  const [model] = (await response.json()).data;
  modelName = model.id;
  byId("model-name").textContent = model.id;
  if (model.max_model_len) byId("max-tokens").max = model.max_model_len;
}

byId("composer").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
byId("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
};
addEventListener("keydown", (event) => event.key === "Escape" && running?.abort());
byId("stop").onclick = () => running?.abort();
byId("new").onclick = startAnew;
byId("show-chat").onclick = () => showView("chat");
byId("show-engine").onclick = () => showView("engine");
byId("use-key").onclick = () => {
  useKey(byId("key").value);
  byId("key-row").hidden = true;
  byId("prompt").focus();
  learnModelName();
  reconnect();
};
byId("key").onkeydown = (event) => event.key === "Enter" && byId("use-key").click();
learnModelName();
watchEngine();
