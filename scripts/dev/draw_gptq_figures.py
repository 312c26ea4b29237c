"""Draw the pictures of docs/learn/07: perplexity, the grid, two inputs, a layer column by column, blocks, all layers.

Milestone: M7. vLLM counterpart: none. No weights, a few seconds:

    python scripts/dev/draw_gptq_figures.py [--out docs/learn/img]

Every number comes from the quantiser's own functions or from a result file; what the page quotes is asserted here.
draw_int4_figures.py draws the pictures of the next page.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figure_files
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from folovllm.gptq_config import GPTQConfig
from folovllm.quantize.example_layer import example_layer
from folovllm.quantize.gptq import GPTQ, output_error, rtn_quantize
from folovllm.quantize.grid import Grid

INK, GREY, DONE, WAITING = "#333333", "#999999", "#9fcbbb", "#f2f2f2"
MOVED_INK, DONE_INK = "#9a5a00", "#00503a"
RTN, FITTED = "#D55E00", "#0072B2"
RESULTS = figure_files.ROOT / "milestones/m7/results"


def bare(ax: Axes, *sides: str) -> None:
    """Removes the frame's top and right, and `sides`."""
    for side in ("top", "right", *sides):
        ax.spines[side].set_visible(False)


def note(ax: Axes, x: float, y: float, text: str, colour: str = INK, size: float = 10, **place: Any) -> None:
    """Text at (x, y) of the data; `place` says which part of the text lies there (ha, va)."""
    ax.text(x, y, text, fontsize=size, color=colour, **place)


def result(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


# ---- perplexity against bits


def perplexities() -> dict[tuple[str | None, int], float]:
    """By method and bits, from our engine; (None, 16) is the plain model."""
    rows = [row for row in result("eval_ppl.json")["rows"] if row["engine"] == "folovllm"]
    return {(row["method"], row["bits"] or 16): row["perplexity"] for row in rows}


def draw_perplexity(path: Path) -> None:
    found = perplexities()
    plain = found[None, 16]
    figure, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
    ax.axhline(plain, color=GREY, ls="--", lw=1)
    note(ax, 2.9, plain * 0.965, f"our starting model: {plain:.1f}", va="top", ha="right", size=10.5)
    for method, colour, name in (("RTN", RTN, "rounded to nearest (RTN)"), ("GPTQ", FITTED, "GPTQ")):
        values = [found[method, bits] for bits in (3, 4)]
        ax.plot([3, 4], values, "o-", color=colour, lw=2, ms=7)
        for bits, value in zip((3, 4), values, strict=True):
            below = method == "GPTQ"
            place = {"xytext": (0, -15 if below else 8), "textcoords": "offset points", "ha": "center"}
            ax.annotate(f"{value:.1f}", (bits, value), fontsize=11, color=colour, weight="bold", **place)
        note(ax, 2.9, values[0], name, ha="right", va="center", colour=colour, size=11)
    ax.set(yscale="log", xlim=(2.3, 4.4), ylim=(9.3, 110), ylabel="perplexity (log scale, lower is better)")
    ax.set_xticks([3, 4], ["3 bits: 8 levels", "4 bits: 16 levels"], fontsize=11)
    ax.set_yticks([10, 20, 40, 80], ["10", "20", "40", "80"])
    ax.minorticks_off()
    bare(ax)
    figure_files.save(figure, path)


# ---- a grid


GROUP = [-0.3, 0.9, 0.1, 0.5]


def draw_grid(path: Path) -> None:
    weight = torch.tensor([GROUP])
    figure, axes = plt.subplots(2, 1, figsize=(9, 3.3), layout="constrained", sharex=True)
    for ax, sym in zip(axes, (False, True), strict=True):
        grid = Grid.find(weight, GPTQConfig(bits=2, sym=sym))
        values = grid.values(torch.arange(4.0)[None])[0].tolist()
        ax.axhline(0, color=GREY, lw=1)
        for level, value in enumerate(values):
            ax.plot([value, value], [-0.16, 0.16], color=INK, lw=2.5)
            zero = "  = zero" if level == int(grid.zero) else ""
            note(ax, value, -0.3, f"level {level}{zero}\n{value + 0.0:.1f}", ha="center", va="top", size=9)
        for w, level in zip(GROUP, grid.levels(weight)[0].int().tolist(), strict=True):
            ax.plot(w, 0.75, "o", color=FITTED, ms=7)
            note(ax, w, 0.95, f"{w}", ha="center", va="bottom", colour=FITTED)
            arrow = {"arrowstyle": "->", "color": FITTED, "lw": 1.3}
            ax.annotate("", (values[level], 0.2), (w, 0.68), arrowprops=arrow)
        name = "symmetric" if sym else "asymmetric"
        ax.set_title(
            f"{name}: scale {grid.scale.item():.1f}, zero {int(grid.zero)}", loc="left", fontsize=10, color=INK
        )
        ax.set(xlim=(-1.45, 1.15), ylim=(-1.05, 1.35))
        ax.axis("off")
    figure_files.save(figure, path)


# ---- two inputs


TOKENS2 = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])  # [num_tokens, 2]
START, NEAREST2, ONE_FIXED, MOVED, ROUNDED = (0.4, 0.4), (0.0, 0.0), (0.0, 0.4), (0.0, 0.6), (0.0, 1.0)


def error2(weights: Sequence[float]) -> float:
    """The squared error of the outputs with two weights instead of START."""
    return float(((TOKENS2 @ (torch.tensor(START) - torch.tensor(weights))) ** 2).sum())


def draw_two_inputs(path: Path) -> None:
    assert [round(error2(w), 2) for w in (NEAREST2, ONE_FIXED, MOVED, ROUNDED)] == [1.92, 0.64, 0.48, 1.12]
    x, y = torch.meshgrid(torch.linspace(-0.95, 1.75, 240), torch.linspace(-0.5, 1.35, 200), indexing="xy")
    d = torch.stack([x - START[0], y - START[1]], dim=-1)  # [200, 240, 2]
    error = torch.einsum("yxi,ij,yxj->yx", d, TOKENS2.t() @ TOKENS2, d)
    figure, ax = plt.subplots(figsize=(9, 6.2), layout="constrained")
    levels = [error2(w) for w in (MOVED, ROUNDED, NEAREST2)]
    ax.contourf(x, y, error, levels=[0, *levels, 9], colors=["#d9ecf7", "#ebf4fa", "#f6fafc", "#ffffff"])
    ax.contour(x, y, error, levels=levels, colors=[GREY], linewidths=1)
    for i in (0, 1):
        for j in (0, 1):
            ax.plot(i, j, "s", color=INK, ms=8, zorder=3)
    step = {"arrowstyle": "-|>", "lw": 2.2, "shrinkA": 6, "shrinkB": 6}
    ax.annotate("", NEAREST2, START, arrowprops=step | {"color": RTN})
    for start, end in ((START, ONE_FIXED), (ONE_FIXED, MOVED), (MOVED, ROUNDED)):
        ax.annotate("", end, start, arrowprops=step | {"color": FITTED, "mutation_scale": 14})
    ax.plot(*START, "o", color=INK, ms=8, zorder=4)
    for point in (ONE_FIXED, MOVED):
        ax.plot(*point, "o", mfc="white", mec=FITTED, mew=2, ms=8, zorder=4)
    notes = [
        (START, (0.5, 0.42), "the weights (0.4, 0.4): error 0", "left", INK),
        (NEAREST2, (0.05, -0.16), "both rounded to nearest (RTN): (0, 0), error 1.92", "left", RTN),
        (ONE_FIXED, (-0.05, 0.36), "1. weight 0 fixed at 0:\nerror 0.64", "right", FITTED),
        (MOVED, (-0.05, 0.62), "2. weight 1 moves to 0.6:\nerror 0.48", "right", FITTED),
        (ROUNDED, (-0.05, 1.06), "3. weight 1 rounded to 1:\nerror 1.12", "right", FITTED),
    ]
    for _, (at_x, at_y), text, side, colour in notes:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
        note(ax, at_x, at_y, text, ha=side, va="center", bbox=box, zorder=5, colour=colour, size=10.5)
    note(
        ax,
        1.73,
        1.27,
        "grey lines: the same error everywhere on a line\nblack squares: what the grid allows",
        ha="right",
        va="center",
    )
    ax.set(xlabel="weight 0", ylabel="weight 1", aspect="equal", xticks=[0, 0.4, 1], yticks=[0, 0.4, 0.6, 1])
    bare(ax)
    figure_files.save(figure, path)


# ---- the 8 x 8 layer


SHOWN = (0, 1, 2, 3, 6, 8)  # after so many columns
TRACED = 2  # the output that the page follows
CONFIG = GPTQConfig(bits=3)  # one group per output
LOST = (2.90, 1.35)  # percent of |W X|^2 with RTN and with GPTQ, as the page says


def columns(compensate: bool = True) -> list[torch.Tensor]:
    """The weights after 0, 1, ... 8 columns: [8, 8] each."""
    weight, hessian = example_layer()
    gptq = GPTQ(CONFIG)
    grid, root = Grid.find(weight, CONFIG), gptq.damped_root(hessian)
    states, work = [weight.clone()], weight.clone()
    for i in range(8):
        rounded = grid.values(grid.levels(work[:, i]))
        if compensate:
            gptq.step(work, i, rounded, root)
        else:
            work[:, i] = rounded
        states.append(work.clone())
    return states


def draw_columns(path: Path) -> None:
    weight, hessian = example_layer()
    states, plain = columns(), columns(compensate=False)
    lost = [[100 * output_error(weight, w, hessian) for w in found] for found in (plain, states)]
    assert (round(lost[0][-1], 2), round(lost[1][-1], 2)) == LOST
    assert torch.equal(plain[-1], rtn_quantize(weight, CONFIG).dequantize())
    figure, axes = plt.subplots(3, 2, figsize=(9, 11.6), layout="constrained")
    for ax, done in zip(axes.flat, SHOWN, strict=True):
        title = f"after column {done - 1}: GPTQ has lost {lost[1][done]:.2f} %, RTN {lost[0][done]:.2f} %"
        ax.set_title(title if done else "the weights W", loc="left", fontsize=11, color=INK)
        before = states[max(done - 1, 0)]
        for row in range(8):
            for column in range(8):
                value, moved = float(states[done][row, column]), float(states[done][row, column] - before[row, column])
                _cell(ax, row, column, value, DONE if column < done else _shade(moved))
        ax.add_patch(Rectangle((0, TRACED), 8, 1, fc="none", ec=INK, lw=1.8))
        if done:
            ax.add_patch(Rectangle((done - 1, 0), 1, 8, fc="none", ec=DONE_INK, lw=2.2))
        ax.set(xlim=(-0.05, 8.05), ylim=(8.05, -0.05), aspect="equal")
        ax.axis("off")
    legend = "green: fixed on the grid; dark frame: the column that was rounded in this step\n"
    legend += "orange: raised in this step, blue: lowered; a stronger colour is a larger change, white is below 0.005"
    figure.suptitle(legend, fontsize=10.5)
    figure_files.save(figure, path)
    Image.open(path).convert("RGB").quantize(96).save(path, optimize=True)  # 384 numbers: a quarter of the bytes


def _shade(moved: float) -> str:
    """White for no change; the deeper the orange (raised) or the blue (lowered), the larger it was."""
    if abs(moved) < 0.005:
        return "#ffffff"
    end, strength = ((230, 140, 20), (60, 140, 200))[moved < 0], min(1.0, 0.25 + abs(moved) / 0.1)
    return "#" + "".join(f"{round(255 + (part - 255) * strength * 0.8):02x}" for part in end)


def _cell(ax: Axes, row: int, column: int, value: float, colour: str) -> None:
    ax.add_patch(Rectangle((column, row), 1, 1, fc=colour, ec=GREY, lw=0.5))
    text = f"{value:.2f}".replace("-0.00", "0.00")
    note(ax, column + 0.5, row + 0.5, text, ha="center", va="center", size=9.5)


# ---- blocks of columns


def draw_blocks(path: Path) -> None:
    """Columns of W while the third column of the second block is rounded; 4 blocks of 4 columns stand for 128 each."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    texts = ("while column 6 is rounded", "when the block is finished")
    for ax, title, current, arrow in zip(axes, texts, (6, None), (True, False), strict=True):
        for column in range(16):
            fixed = column < (6 if arrow else 8)
            near = arrow and 6 < column < 8
            colour = DONE if fixed else "#e8a33d" if near or (not arrow) else WAITING
            colour = "#2f8f6f" if column == current else colour
            ax.add_patch(Rectangle((column, 0), 1, 4, fc=colour, ec="white", lw=1.2))
        for block in range(4):
            ax.add_patch(Rectangle((4 * block, 0), 4, 4, fc="none", ec=INK, lw=1.4))
            note(ax, 4 * block + 2, 4.35, f"block {block}", ha="center", size=9.5)
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.set(xlim=(-0.1, 16.1), ylim=(-2.2, 4.9))
        ax.axis("off")
    note(axes[0], 3, -0.25, "fixed", ha="center", va="top", colour=DONE_INK)
    note(
        axes[0],
        7.1,
        -0.25,
        "column 6 updates\nonly the rest of\nits own block",
        ha="center",
        va="top",
        colour=MOVED_INK,
    )
    note(axes[0], 12.9, -0.25, "waits: its updates\nare collected", ha="center", va="top")
    note(axes[1], 4, -0.25, "fixed", ha="center", va="top", colour=DONE_INK)
    note(
        axes[1], 12, -0.25, "one matrix product applies\nall errors of block 1", ha="center", va="top", colour=MOVED_INK
    )
    figure_files.save(figure, path)


# ---- the errors of a whole model


def draw_layers(path: Path) -> None:
    """Each decoder layer: the share of the output that is lost, the mean of its four linear layers."""
    figure, ax = plt.subplots(figsize=(9, 3.9), layout="constrained")
    for arm, log in result("quantize.json")["logs"].items():
        for key, name, colour in (("rtn_error", "RTN", RTN), ("error", "GPTQ", FITTED)):
            layers = sorted({entry["layer"] for entry in log["linears"]})
            means = []
            for layer in layers:
                found = [100 * entry[key] for entry in log["linears"] if entry["layer"] == layer]
                means.append(sum(found) / len(found))
            ax.plot(layers, means, "-" if arm[-1] == "3" else "--", color=colour, lw=2)
            height = means[-1] * (1.07 if name == "RTN" else 0.93)  # two lines end close together
            note(ax, 29.4, height, f"{name}, {arm[-1]} bits", va="center", colour=colour)
    ax.set(yscale="log", xlabel="decoder layer", xlim=(0, 34.5), ylim=(0.1, 8))
    ax.set_ylabel("% of the output lost, mean of\nthe four linear layers (log scale)")
    ax.set_yticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    ax.set_xticks([0, 5, 10, 15, 20, 25, 29])
    ax.minorticks_off()
    bare(ax)
    figure_files.save(figure, path)


FIGURES = {
    "07_perplexity": draw_perplexity,
    "07_grid": draw_grid,
    "07_two_inputs": draw_two_inputs,
    "07_columns": draw_columns,
    "07_blocks": draw_blocks,
    "07_layers": draw_layers,
}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
