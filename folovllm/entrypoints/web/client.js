// client.js: how the page talks to its server: addresses below its own, the API key, server-sent events. Milestone M8.
"use strict";

let key = "";

export function useKey(text) {
  key = text.trim();
}

// The addresses are relative, so the page also works behind a proxy that gives it a folder.
// `id` becomes the request's name.
export function ask(path, { id, ...options } = {}) {
  const headers = {};
  if (options.body) headers["Content-Type"] = "application/json";
  if (id) headers["X-Request-Id"] = id;
  if (key) headers.Authorization = `Bearer ${key}`;
  return fetch(path, { ...options, headers });
}

// The data of each event, until the stream ends. Its chunks may be cut anywhere, also within a character.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).replace(/^ /, "")); // one space belongs to the format, no more
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // who leaves the loop leaves the server, too
  }
}

// What the server says about an answer that is not ok, as one sentence.
export async function errorText(response) {
  const body = await response.json().catch(() => ({}));
  return body.error?.message ?? `the server answered ${response.status} ${response.statusText}`;
}
