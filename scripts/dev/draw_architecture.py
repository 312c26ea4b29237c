"""Draw docs/img/architecture.png, the picture of the README: the path of a request, each box a file.

Milestone: M1. vLLM counterpart: none. No torch, no weights, a second:

    python scripts/dev/draw_architecture.py [--out docs/img/architecture.png]

A box that names a file which does not exist is an error, so the picture follows a renaming or the script fails. The
background is opaque, because GitHub shows pages on white and on black.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no window system needed

from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parents[2]
PAPER, INK, LINE = "#ffffff", "#1b1f24", "#57606a"
WIDTH, HEIGHT = 3.06, 0.86  # of a box, in units of the drawing
CENTRES = (1.85, 5.95, 10.05)  # x of the three columns


@dataclass(frozen=True)
class Box:
    file: str  # below folovllm/
    does: str
    column: int
    y: float


@dataclass(frozen=True)
class Column:
    title: str
    note: str
    colour: str


COLUMNS = (
    Column("text", "what you call, and words", "#ddf4ff"),
    Column("decides", "plain Python, no torch", "#fff8c5"),
    Column("computes", "torch, C++, Triton", "#dafbe1"),
)
BOXES = {
    "llm": Box("entrypoints/llm.py", "prompts in, answers out", 0, 5.6),
    "input": Box("engine/input_processor.py", "checks, tokenises", 0, 4.2),
    "output": Box("engine/output_processor.py", "one answer per request", 0, 2.8),
    "detokenizer": Box("engine/detokenizer.py", "ids to text, stop strings", 0, 1.4),
    "core": Box("engine/core.py", "the loop: one step at a time", 1, 5.6),
    "scheduler": Box("core/sched/scheduler.py", "how many tokens for which request", 1, 4.2),
    "manager": Box("core/kv_cache_manager.py", "blocks for each request", 1, 2.8),
    "pool": Box("core/block_pool.py", "free, held and cached blocks", 1, 1.4),
    "runner": Box("worker/model_runner.py", "one flat batch of all requests", 2, 5.6),
    "model": Box("model_executor/models/llama.py", "the decoder layers", 2, 4.2),
    "attention": Box("attention/backends/", "K and V through block tables", 2, 2.8),
    "sampler": Box("sample/sampler.py", "logits to the next token", 2, 1.4),
}
DOWN = [("llm", "input"), ("core", "scheduler"), ("scheduler", "manager"), ("manager", "pool")]
DOWN += [("runner", "model"), ("model", "attention"), ("attention", "sampler"), ("output", "detokenizer")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/img/architecture.png")
    out = parser.parse_args().out
    missing = [box.file for box in BOXES.values() if not (ROOT / "folovllm" / box.file).exists()]
    if missing:
        raise SystemExit(f"no such file in folovllm/: {', '.join(missing)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure = draw()
    figure.savefig(out, dpi=110, facecolor=PAPER, metadata={"Software": None})  # the same bytes in every run
    print(f"{out.name}: {out.stat().st_size / 1024:.0f} KiB")


def draw() -> Any:
    figure, axes = plt.subplots(figsize=(9.1, 5.5))
    axes.set_xlim(0, 11.9)
    axes.set_ylim(0.35, 7.3)
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    for index, column in enumerate(COLUMNS):
        draw_column(axes, CENTRES[index], column)
    for box in BOXES.values():
        draw_box(axes, box)
    for upper, lower in DOWN:
        arrow(axes, edge(upper, "bottom"), edge(lower, "top"))
    draw_messages(axes)
    return figure


def draw_column(axes: Any, x: float, column: Column) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x - 1.7, 0.6), 3.4, 6.45, boxstyle="round,pad=0,rounding_size=0.15", fc=column.colour, ec="none"
        )
    )
    axes.text(x, 6.72, column.title, ha="center", va="center", fontsize=12, weight="bold", color=INK)
    axes.text(x, 6.36, column.note, ha="center", va="center", fontsize=8.5, color=LINE)


def draw_box(axes: Any, box: Box) -> None:
    x = CENTRES[box.column]
    corner = (x - WIDTH / 2, box.y - HEIGHT / 2)
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", fc=PAPER, ec=LINE))
    axes.text(x, box.y + 0.16, box.file, ha="center", va="center", fontsize=8.4, family="monospace", color=INK)
    axes.text(x, box.y - 0.2, box.does, ha="center", va="center", fontsize=8.8, color=LINE)


def draw_messages(axes: Any) -> None:
    """What crosses between the columns: a request, and one message down and one up in every step."""
    arrow(axes, edge("input", "right"), edge("core", "left", 0.2), bend=3.65)
    message(axes, 3.65, 4.9, "Request")
    arrow(axes, edge("core", "right", 0.15), edge("runner", "left", 0.15))
    message(axes, 8.0, 6.16, "Scheduler-\nOutput")
    arrow(axes, edge("sampler", "left"), edge("core", "right", -0.2), bend=8.0)
    message(axes, 8.0, 3.5, "ModelRunner-\nOutput")
    arrow(axes, edge("core", "left", -0.2), edge("output", "right"), bend=4.05)
    message(axes, 4.05, 3.5, "tokens")


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], bend: float | None = None) -> None:
    """Straight, or with `bend` along a vertical line at that x."""
    if bend is not None:
        axes.plot([start[0], bend, bend], [start[1], start[1], end[1]], color=LINE, lw=1.3)
        start = (bend, end[1])
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=LINE, lw=1.3, shrinkA=0, shrinkB=0)
    )


def message(axes: Any, x: float, y: float, text: str) -> None:
    look = {"boxstyle": "round,pad=0.2", "fc": PAPER, "ec": "none"}
    axes.text(x, y, text, ha="center", va="center", fontsize=7.6, style="italic", color=INK, bbox=look)


def edge(name: str, side: str, shift: float = 0.0) -> tuple[float, float]:
    """The middle of a side of a box; `shift` moves it up along a vertical side."""
    box = BOXES[name]
    x = CENTRES[box.column]
    if side in ("left", "right"):
        return x + WIDTH / 2 * (1 if side == "right" else -1), box.y + shift
    return x + shift, box.y + HEIGHT / 2 * (1 if side == "top" else -1)


if __name__ == "__main__":
    main()
