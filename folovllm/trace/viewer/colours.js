// colours.js: the colours of a page, which stand in style.css only, for the canvases. Milestone M2.
"use strict";

const COLOURS = "text faint line bar cursor chosen divergence waiting preempted idle prefill chunk decode hit cached onColour onBlock ground";

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// A canvas needs them computed, so an invisible element is asked for each.
function readColours(probe) {
  const read = (name) => {
    probe.style.color = `var(--${name})`;
    return [name, getComputedStyle(probe).color];
  };
  return Object.fromEntries(COLOURS.split(" ").map(read));
}
