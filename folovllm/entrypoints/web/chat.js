// chat.js: the conversation: the messages, the settings, and how the answers come in. Milestone M8.
"use strict";

import { Measured, chunksOf, newId } from "./answer.js";
import { ask, useKey } from "./client.js";
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
  setBusy(true);
  try {
    await stream(makeRequest([...thread, said]), answer, measured, signal);
    finish(answer, measured.describe());
  } catch (error) {
    if (error.status === 401) askForKey();
    if (error.name === "AbortError") finish(answer, measured.describe("stopped"));
    else fail(answer, error instanceof TypeError ? "no connection to the server" : error.message, text);
  }
  const content = answer.text.textContent;
  if (content) thread.push(said, { role: "assistant", content });
  running = null;
  setBusy(false);
}

// Empty fields are left out: the server then decides.
function makeRequest(messages) {
  const read = (id) => byId(id).value.trim();
  const request = { messages };
  if (modelName) request.model = modelName;
  if (read("system")) request.messages = [{ role: "system", content: read("system") }, ...messages];
  if (read("temperature")) request.temperature = Number(read("temperature"));
  if (read("max-tokens")) request.max_tokens = Number(read("max-tokens"));
  if (Number(read("at-once")) > 1) request.n = Number(read("at-once")); // the first one is shown: the others are for the engine
  return request;
}

async function stream(request, answer, measured, signal) {
  const id = newId();
  markMine(id);
  for await (const chunk of chunksOf(request, id, signal)) {
    const text = measured.take(chunk);
    answer.root.style.setProperty("--owner", colourOfMine(id) ?? "var(--line)");
    if (text) add(answer, text, measured.describe());
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

function add(answer, text, foot) {
  keepInSight(() => {
    answer.text.append(text); // as text: whatever the model writes is never HTML
    answer.foot.textContent = foot;
  });
}

function finish(answer, foot) {
  answer.root.classList.remove("running");
  keepInSight(() => (answer.foot.textContent = foot));
}

// A message that got no answer comes back, so that it can be sent again.
function fail(answer, why, text) {
  answer.root.classList.add("failed");
  finish(answer, why);
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
