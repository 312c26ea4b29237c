#!/usr/bin/env python3
"""Draw the pictures of README.md and docs/roadmap.md: the ladder's speeds, the peers' speeds, what builds on what.

Milestone: M0. vLLM counterpart: none. No torch, no weights, two seconds:

    python scripts/dev/draw_front_figures.py [--out docs/img]

Each PNG carries a hash of the data that it shows, so a test sees when a result file or the manifest has moved on.
"""

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no window system needed

from figure_files import hash_of
from front_plan import manifest
from front_results import LADDER as LADDER_FILE
from front_results import PEERS, result
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

from folovllm.milestones import LADDER

ROOT = Path(__file__).resolve().parents[2]
GREY, BLUE, ORANGE, INK = "#8c959f", "#0072B2", "#E69F00", "#1b1f24"
PANELS = {"single": ("{n} requests, one by one", BLUE), "batch": ("{n} requests together", ORANGE)}
WIDTH, DPI = 9, 100


# ---- what the pictures show, as plain data


def ladder_data() -> dict[str, Any]:
    """Mode -> label -> tokens per second, for HuggingFace and each rung that was measured."""
    measured = result(LADDER_FILE)
    names = {"hf": "HuggingFace\ngenerate"} | {r.id: f"{r.id.upper()}\n{r.title}" for r in LADDER}
    arms = {label: measured["arms"][arm]["modes"] for arm, label in names.items() if arm in measured["arms"]}
    return {mode: {label: modes[mode]["output_tok_per_s"] for label, modes in arms.items()} for mode in PANELS}


def peers_data() -> dict[str, Any]:
    """Mode -> label -> (lowest, median, highest) tokens per second, ours first."""
    arms = [arm for arm in result(PEERS)["arms"].values() if "modes" in arm]
    labels = [f"{arm['label'].partition(' m')[0]}\n{arm['weights']}" for arm in arms]
    speeds = {mode: [arm["modes"][mode]["output_tok_per_s"] for arm in arms] for mode in PANELS}
    return {
        mode: {label: [s["min"], s["median"], s["max"]] for label, s in zip(labels, speeds[mode], strict=True)}
        for mode in PANELS
    }


def roadmap_data() -> dict[str, Any]:
    return {rung.id: [rung.title, rung.built, manifest()[rung.id]["needs"]] for rung in LADDER}


# ---- bars


def draw_ladder(data: dict[str, Any]) -> Any:
    figure, axes = _panels(data, result(LADDER_FILE))
    for ax, (mode, (_, colour)) in zip(axes, PANELS.items(), strict=True):
        bars = {label: (speed, speed, speed) for label, speed in data[mode].items()}
        _bars(ax, bars, lambda label, c=colour: GREY if label.startswith("HuggingFace") else c)
    return figure


def draw_peers(data: dict[str, Any]) -> Any:
    measured = result(PEERS)
    figure, axes = _panels(data, measured)
    for ax, (mode, (_, colour)) in zip(axes, PANELS.items(), strict=True):
        _bars(ax, data[mode], lambda label, c=colour: c if label.startswith("FoloVLLM") else GREY)
    floor = measured["bandwidth"]["floor_tok_per_s"]
    axes[0].axvline(floor, color=INK, linestyle="--", linewidth=1)
    axes[0].annotate(
        f"limit for bf16: {floor:.0f}\n(every weight is\nread per token)", (floor, len(data["single"]) - 0.55),
        xytext=(5, 0), textcoords="offset points", va="bottom", fontsize=9,
    )  # fmt: skip
    return figure


def _panels(data: dict[str, Any], measured: dict[str, Any]) -> tuple[Any, Any]:
    run = measured["run"]
    height = 1.0 + 0.5 * len(data["single"])
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, height), layout="constrained", sharey=True)
    machine = f"{measured['machine']['cpu']}, {run['threads']} threads"
    figure.suptitle(f"Output tokens per second, {run['model']} on {machine}", fontsize=11)
    for ax, (mode, (title, _)) in zip(axes, PANELS.items(), strict=True):
        ax.set_title(title.format(n=run["workload"]["num_requests"][mode]), fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bars(ax: Any, bars: dict[str, Any], colour_of: Callable[[str], str]) -> None:
    """Horizontal bars with the median as a number, and whiskers where the runs differ."""
    widest = max(high for _, _, high in bars.values())
    for place, (name, (low, middle, high)) in enumerate(bars.items()):
        ax.barh(place, middle, color=colour_of(name), height=0.7)
        if high > low:
            ax.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color=INK, capsize=3, linewidth=1)
        label = ax.text(high + 0.02 * widest, place, f"{middle:.0f}", va="center", fontsize=10)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # above the line of a limit
    ax.set_yticks(range(len(bars)), list(bars), fontsize=9)
    ax.set_ylim(len(bars) - 0.4, -0.6)  # the first on top
    ax.margins(x=0.15)
    ax.tick_params(axis="x", labelsize=9)


# ---- the roadmap


PLACES = {
    "m0": (0, 0), "m1": (1, 0), "m2": (2, 0), "m3": (3, 0),
    "m4": (4, 0.9), "m5": (4, 0), "m6": (5, 0), "m7": (5, 0.9), "m8": (6, 0), "m9": (6, 0.9), "m10": (7, 0.45),
}  # fmt: skip
BOX = (0.82, 0.66)


def draw_roadmap(data: dict[str, Any]) -> Any:
    """A box per milestone, an arrow from each to what builds on it."""
    figure, ax = plt.subplots(figsize=(WIDTH, 2.4), layout="constrained")
    for name, (title, built, needs) in data.items():
        x, y = PLACES[name]
        fill = "#ddf4ff" if built else "#ffffff"
        corner = (x - BOX[0] / 2, y - BOX[1] / 2)
        round_ = "round,pad=0,rounding_size=0.08"
        ax.add_patch(FancyBboxPatch(corner, *BOX, boxstyle=round_, facecolor=fill, edgecolor=BLUE))
        ax.text(x, y, f"{name.upper()}\n{in_box(title)}", ha="center", va="center", fontsize=10, color=INK)
        for need in needs:
            _arrow(ax, PLACES[need], (x, y))
    ax.set_xlim(-0.5, 7.5)
    ax.set_ylim(-0.4, 1.3)
    ax.set_axis_off()
    return figure


def in_box(title: str) -> str:
    return textwrap.fill(title, 13, break_long_words=False)


def _arrow(ax: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From the right side of a box to the left side of one in the next column."""
    style = {"arrowstyle": "-|>", "color": "#57606a", "linewidth": 1.2, "shrinkA": 1, "shrinkB": 2}
    ax.annotate("", xy=(end[0] - BOX[0] / 2, end[1]), xytext=(start[0] + BOX[0] / 2, start[1]), arrowprops=style)


FIGURES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], Any]]] = {
    "ladder": (ladder_data, draw_ladder),
    "peers": (peers_data, draw_peers),
    "roadmap": (roadmap_data, draw_roadmap),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/img", help="folder for the PNG files")
    out = parser.parse_args().out
    for name, (data_of, draw) in FIGURES.items():
        data = data_of()
        path = out / f"{name}.png"
        draw(data).savefig(path, dpi=DPI, facecolor="white", metadata={"Description": hash_of(data)})
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
