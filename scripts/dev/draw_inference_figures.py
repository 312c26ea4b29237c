"""Draw the pictures of docs/learn/01_basic_inference.

Milestone: M1. vLLM counterpart: none. No torch, no weights, a few seconds:

    python scripts/dev/draw_inference_figures.py [--out docs/learn/img]

The numbers that the page quotes are asserted here.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figure_files
import numpy as np
from figure_shapes import (
    COLOURS,
    DATA,
    FREE,
    INK,
    LINE,
    PALE,
    TEXT,
    WORKER,
    arrow,
    canvas,
    cell,
    note,
    panel,
    save,
    visible,
)
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch

from folovllm.learn.three_requests import EXAMPLES, example_core, run_example


def main() -> None:
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)


# ---- 01: the forward pass


def draw_forward(path: Path) -> None:
    """The forward pass of request a's prompt in SmolLM2-135M, with the shape of every tensor."""
    axes = canvas(9, 6.6)
    left = [
        ("token ids", "[5]", TEXT),
        ("embedding", "[5, 576]", WORKER),
        ("decoder layer 0", "[5, 576]", WORKER),
        ("decoder layers 1 to 28", "[5, 576]", WORKER),
        ("decoder layer 29", "[5, 576]", WORKER),
        ("last row, RMSNorm", "[1, 576]", WORKER),
        ("output matrix: logits", "[1, 49152]", WORKER),
        ("sampler: one token id", "[1]", TEXT),
    ]
    for index, (title, shape, fill) in enumerate(left):
        y = 5.75 - 0.78 * index
        panel(axes, 0.15, y, 2.3, 0.52, fill, LINE)
        note(axes, 1.3, y + 0.26, title, 9.5, ha="center")
        if index < len(left) - 1:
            arrow(axes, (1.3, y), (1.3, y - 0.26))
            note(axes, 1.42, y - 0.13, shape, 9, color=LINE)
    axes.plot([2.45, 3.0], [4.71, 6.4], color=LINE, lw=0.8, ls=":")
    axes.plot([2.45, 3.0], [4.19, 0.12], color=LINE, lw=0.8, ls=":")
    panel(axes, 3.0, 0.12, 5.9, 6.3, "#fdf6ec", LINE)
    note(axes, 4.0, 6.22, "inside every decoder layer", 10.5, weight="bold")
    draw_layer(axes)
    save(axes, path)


def draw_layer(axes: Axes) -> None:
    """The boxes of one layer, in the order in which they run, with the residual on the left."""
    residual = 3.35
    note(axes, 3.12, 6.22, "input", 9, color=LINE)
    note(axes, 3.48, 0.36, "to the next layer", 9, color=LINE)
    axes.plot([residual, residual], [6.08, 0.62], color=LINE, lw=2.2)
    axes.text(3.2, 2.85, "residual [5, 576]", size=9, color=LINE, rotation=90, va="center", ha="center")
    ys = (5.35, 4.78, 4.21, 3.64, 3.07)
    names = ("RMSNorm", "QKV projection", "RoPE: turn q and k by position", "attention", "output projection")
    for y, name in zip(ys, names, strict=True):
        panel(axes, 4.0, y, 2.4, 0.36, "white", LINE)
        note(axes, 5.2, y + 0.18, name, 9.5, ha="center")
    for upper, lower in itertools.pairwise(ys):
        arrow(axes, (5.2, upper), (5.2, lower + 0.36))
    arrow(axes, (residual, 5.53), (4.0, 5.53))
    arrow(axes, (4.0, 3.25), (residual, 3.25))
    note(axes, 3.5, 3.39, "add", 9, color=LINE)
    shapes = ("[5, 576]", "q [5, 9, 64]   k, v [5, 3, 64]", "q [5, 9, 64]   k [5, 3, 64]", "", "[5, 576]")
    for y, shape in zip(ys, shapes, strict=True):
        note(axes, 6.5, y + 0.18, shape, 9, color=LINE)
    note(axes, 5.27, 3.53, "[5, 576]", 9, color=LINE)
    panel(axes, 6.85, 3.53, 1.9, 0.58, WORKER, LINE)
    note(axes, 7.8, 3.94, "KV cache of the layer", 9.5, ha="center", weight="bold")
    note(axes, 7.8, 3.69, "write k, v; read all", 9, ha="center", color=LINE)
    arrow(axes, (6.4, 3.9), (6.85, 3.9))
    arrow(axes, (6.85, 3.74), (6.4, 3.74))
    draw_mlp(axes, residual)
    note(axes, 4.0, 5.93, "attention block: tokens look at each other", 9.5, color="#b35900")
    note(axes, 4.0, 2.83, "MLP block: each row by itself", 9.5, color="#b35900")


def draw_mlp(axes: Axes, residual: float) -> None:
    ys = (2.3, 1.73, 1.16, 0.59)
    names = ("RMSNorm", "gate and up projection", "silu(gate) * up", "down projection")
    shapes = ("[5, 576]", "[5, 2 * 1536]", "[5, 1536]", "[5, 576]")
    for y, name, shape in zip(ys, names, shapes, strict=True):
        panel(axes, 4.0, y, 2.4, 0.36, "white", LINE)
        note(axes, 5.2, y + 0.18, name, 9.5, ha="center")
        note(axes, 6.5, y + 0.18, shape, 9, color=LINE)
    for upper, lower in itertools.pairwise(ys):
        arrow(axes, (5.2, upper), (5.2, lower + 0.36))
    arrow(axes, (residual, 2.48), (4.0, 2.48))
    arrow(axes, (4.0, 0.77), (residual, 0.77))
    note(axes, 3.5, 0.91, "add", 9, color=LINE)
    arrow(axes, (residual, 0.7), (residual, 0.3), width=2.2)


def draw_attention(path: Path) -> None:
    """The attention weights of two heads over request a's prompt, as the model computes them."""
    figure, all_axes = plt.subplots(1, 2, figsize=(9, 3.9))
    pieces = [visible(text) for text in EXAMPLES["a"].pieces]
    for axes, (name, title) in zip(all_axes, HEADS.items(), strict=True):
        weights = np.array(DATA["attention"][name])  # [5, 5]
        shown = np.where(np.tri(5) > 0, weights, np.nan)
        axes.imshow(shown, cmap="Blues", vmin=0, vmax=1)
        for query in range(5):
            for key in range(query + 1):
                value = weights[query, key]
                axes.text(
                    key,
                    query,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    size=9.5,
                    color="white" if value > 0.55 else INK,
                )
        axes.set_xticks(range(5), pieces, size=9.5)
        axes.set_yticks(range(5), pieces, size=9.5)
        axes.set_xlabel("key: the token looked at")
        axes.set_ylabel("query: the token that looks")
        axes.set_title(title, size=10.5)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    assert round(DATA["attention"]["23.4"][4][3], 2) == 0.90 and round(DATA["attention"]["11.1"][2][1], 2) == 0.87
    figure.tight_layout()
    figure_files.save(figure, path)


HEADS = {"11.1": "layer 11, head 1: the token before", "23.4": 'layer 23, head 4: "is" looks at "France"'}


def draw_recompute(path: Path) -> None:
    """Positions that the model computes per step of request a, without and with a KV cache."""
    prompt, output = 5, 4
    without = [prompt + i for i in range(output)]
    with_cache = [step.scheduled["a"] for step in run_example(example_core(num_kv_blocks=10)) if "a" in step.scheduled]
    assert (sum(without), sum(with_cache)) == (26, 8)
    axes = canvas(9, 2.75)
    for x0, title, counts in (
        (0.6, f"without a cache: {sum(without)} positions", without),
        (5.0, f"with a cache: {sum(with_cache)} positions", with_cache),
    ):
        note(axes, x0, 2.52, title, 10.5, weight="bold")
        for row, count in enumerate(counts):
            y = 1.85 - 0.44 * row
            note(axes, x0 - 0.1, y + 0.2, f"step {row}", 9, ha="right", color=LINE)
            known = prompt + row
            for position in range(known):
                computed = position >= known - count
                fill = COLOURS["a"] if computed else PALE["a"]
                cell(axes, x0 + 0.44 * position, y, 0.44, 0.4, str(position), fill, "white" if computed else LINE)
    note(axes, 0.6, 0.15, "dark: computed in this step; pale: only its key and value are read", 9.5, color=LINE)
    save(axes, path)


def draw_sampler(path: Path) -> None:
    """One row of logits through temperature, top_k and top_p: the token after "Once upon a time,"."""
    stages = DATA["sampling"]["stages"]
    pieces = [visible(text) for text in DATA["sampling"]["pieces"]]
    figure, all_axes = plt.subplots(1, len(stages), figsize=(9, 3.7), sharey=True, sharex=True)
    for axes, stage in zip(all_axes, stages, strict=True):
        values = [*stage["probabilities"], stage["others"]]
        ys = range(len(values))
        axes.barh(ys, values, color=[COLOURS["b"] if v > 0 else FREE for v in values], height=0.72)
        for y, value in zip(ys, values, strict=True):
            is_out = value == 0
            axes.text(value + 0.012, y, "removed" if is_out else f"{value:.1%}",
                      va="center", size=9, color="#999999" if is_out else INK)  # fmt: skip
        axes.set_title(stage["title"], size=10)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    all_axes[0].set_yticks(range(len(pieces) + 1), [*pieces, labels_of_others(stages)], size=9.5)
    all_axes[0].invert_yaxis()
    all_axes[0].set_xlim(0, 0.62)
    figure.tight_layout()
    figure_files.save(figure, path)


def labels_of_others(stages: Sequence[dict[str, Any]]) -> str:
    return f"{stages[0]['others_left']:,} others"


def draw_times(path: Path) -> None:
    """The moments of a request and the names of the times between them."""
    axes = canvas(9, 2.9)
    moments = {"arrival": 0.5, "scheduled": 2.4, "first token": 4.3, "last token": 8.0}
    tokens = [4.3, 5.2, 6.2, 7.0, 8.0]
    axes.plot([0.5, 8.4], [2.15, 2.15], color=INK, lw=1.5)
    for name, x in moments.items():
        axes.plot([x, x], [2.05, 2.3], color=INK, lw=1.5)
        note(axes, x, 2.5, name, 10, ha="center", weight="bold")
    for x in tokens:
        axes.plot([x], [2.15], "o", color=COLOURS["a"], ms=8)
    spans = (
        (0.5, 2.4, 1.75, "queue time"),
        (2.4, 4.3, 1.75, "prefill time"),
        (4.3, 8.0, 1.75, "decode time"),
        (0.5, 4.3, 1.25, "time to first token (TTFT)"),
        (5.2, 6.2, 1.25, "inter-token\nlatency (ITL)"),
        (0.5, 8.0, 0.55, "end-to-end latency"),
    )
    for start, end, y, name in spans:
        axes.add_patch(
            FancyArrowPatch(
                (start, y), (end, y), arrowstyle="<|-|>", mutation_scale=9, color=LINE, shrinkA=1, shrinkB=1
            )
        )
        note(axes, (start + end) / 2, y - (0.3 if "\n" in name else 0.2), name, 9.5, ha="center")
    save(axes, path)


FIGURES = {
    "01_forward": draw_forward,
    "01_attention": draw_attention,
    "01_recompute": draw_recompute,
    "01_sampler": draw_sampler,
    "01_times": draw_times,
}


if __name__ == "__main__":
    main()
