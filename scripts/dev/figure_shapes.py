"""Shapes and texts for the diagrams of docs/learn/00 and 01: boxes, arrows, cells, tokens of the three requests.

Milestone: M1. vLLM counterpart: none. Imported by scripts/dev/draw_start_figures.py, draw_setup_figures.py and
draw_inference_figures.py. Probabilities and attention weights in `DATA` are those of SmolLM2-135M-Instruct in fp32;
scripts/dev/record_first_tokens.py writes them.
"""

import json
from pathlib import Path
from typing import Any

import figure_files
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image

from folovllm.learn.three_requests import EXAMPLES, PIECES, Step, example_core, run_example

ROOT = Path(__file__).parents[2]
DATA: dict[str, Any] = json.loads((ROOT / "docs/data/first_tokens.json").read_text(encoding="utf-8"))
COLOURS = {"a": "#0072B2", "b": "#E69F00", "c": "#009E73"}
ON = {"a": "white", "b": "#1b1f24", "c": "white"}  # text on COLOURS
PALE = {"a": "#cfe4f2", "b": "#fbe6bd", "c": "#c5e8dc"}
TEXT, CORE, WORKER = "#eeeeee", "#e0ecfa", "#fde9d2"
INK, LINE, FREE = "#1b1f24", "#57606a", "#dddddd"
BLOCK_SIZE = 4
plt.rcParams.update({"font.size": 10, "figure.facecolor": "white", "savefig.facecolor": "white"})


def canvas(width: float, height: float) -> Axes:
    """Axes without frame whose units are inches."""
    figure = plt.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def save(axes: Axes, path: Path) -> None:
    figure_files.save(axes.figure, path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)  # a third of the size


def panel(axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str = "none") -> None:
    look = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=look, fc=fill, ec=edge, lw=1))


def box(axes: Axes, x: float, y: float, width: float, title: str, does: str = "", height: float = 0.62) -> None:
    """A component: its name in bold and what it does below, on white. (x, y) is the lower left corner."""
    panel(axes, x, y, width, height, "white", LINE)
    middle = x + width / 2
    if does:
        axes.text(middle, y + height * 0.69, title, ha="center", va="center", size=10, weight="bold", color=INK)
        axes.text(middle, y + height * 0.28, does, ha="center", va="center", size=9, color=LINE)
    else:
        axes.text(middle, y + height / 2, title, ha="center", va="center", size=10, color=INK)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = LINE, width: float = 1.4
) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, lw=width, shrinkA=0, shrinkB=0)
    )


def cell(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    fill: str,
    colour: str = INK,
    size: float = 9,
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, fc=fill, ec="white", lw=1.2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", size=size, color=colour)


def note(axes: Axes, x: float, y: float, text: str, size: float = 9.5, **look: Any) -> None:
    style = {"ha": "left", "va": "center", "color": INK} | look
    axes.text(x, y, text, size=size, **style)


def piece(token_id: int) -> str:
    """A token as one reads it in a picture: its space as ␣, a line break as \\n."""
    return visible(PIECES[token_id])


def visible(text: str) -> str:
    return text.replace("\n", "\\n").replace(" ", "␣")


def step_of(number: int, **engine_args: Any) -> Step:
    return list(run_example(example_core(**engine_args)))[number]


def known_ids(name: str, count: int) -> list[int]:
    example = EXAMPLES[name]
    return list(example.prompt_token_ids + example.answer_token_ids)[:count]


def best(key: str, count: int) -> list[tuple[str, float]]:
    """The most likely next tokens of a recorded position, e.g. "a0": the first answer token of request a."""
    return [(text, probability) for text, probability in DATA["next_tokens"][key]][:count]
