"""Draw the pictures of docs/learn/07 and 07b: rounding, GPTQ step by step, packed words, the kernel, its cost.

Milestone: M7. vLLM counterpart: none. No weights, a few seconds:

    python scripts/dev/draw_gptq_figures.py [--out docs/learn/img]

Every number and every bit comes from the quantiser's own functions or from a result file; what the pages quote is
asserted here. Only the roofline is a model: two measured rates and a count of instructions.
"""

import json
import re
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
from folovllm.model_executor.layers.quantization.packing import packing_for
from folovllm.quantize.example_layer import example_layer
from folovllm.quantize.gptq import GPTQ, output_error, rtn_quantize
from folovllm.quantize.grid import Grid
from folovllm.sim.hardware import HARDWARE

INK, GREY, DONE, WAITING = "#333333", "#999999", "#9fcbbb", "#f2f2f2"
RTN, FITTED, BF16, INT4 = "#D55E00", "#0072B2", "#0072B2", "#D55E00"
VALUES = ("#cfe8dd", "#f6d9b8")  # neighbouring values in a word take turns
SPLIT = "#e78ac3"  # a value that lies across two words
RESULTS = figure_files.ROOT / "milestones/m7/results"
PAGES = figure_files.ROOT / "docs/learn"


def bare(ax: Axes, *sides: str) -> None:
    """Removes the frame's top and right, and `sides`."""
    for side in ("top", "right", *sides):
        ax.spines[side].set_visible(False)


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
    ax.text(2.9, plain * 0.965, f"not quantised: {plain:.1f}", va="top", ha="right", fontsize=10.5, color=INK)
    for method, colour, name in (("RTN", RTN, "rounded to nearest (RTN)"), ("GPTQ", FITTED, "GPTQ")):
        values = [found[method, bits] for bits in (3, 4)]
        ax.plot([3, 4], values, "o-", color=colour, lw=2, ms=7)
        for bits, value in zip((3, 4), values, strict=True):
            below = method == "GPTQ"
            place = {"xytext": (0, -15 if below else 8), "textcoords": "offset points", "ha": "center"}
            ax.annotate(f"{value:.1f}", (bits, value), fontsize=11, color=colour, weight="bold", **place)
        ax.text(2.9, values[0], name, ha="right", va="center", fontsize=11, color=colour)
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
            ax.text(value, -0.3, f"level {level}{zero}\n{value + 0.0:.1f}", ha="center", va="top", fontsize=9, color=INK)
        for w, level in zip(GROUP, grid.levels(weight)[0].int().tolist(), strict=True):
            ax.plot(w, 0.75, "o", color=FITTED, ms=7)
            ax.text(w, 0.95, f"{w}", ha="center", va="bottom", fontsize=10, color=FITTED)
            arrow = {"arrowstyle": "->", "color": FITTED, "lw": 1.3}
            ax.annotate("", (values[level], 0.2), (w, 0.68), arrowprops=arrow)
        name = "symmetric" if sym else "asymmetric"
        ax.set_title(f"{name}: scale {grid.scale.item():.1f}, zero {int(grid.zero)}", loc="left", fontsize=10, color=INK)
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
        (ROUNDED, (-0.05, 1.06), "3. weight 1 rounded:\n(0, 1), error 1.12", "right", FITTED),
    ]
    for _, (at_x, at_y), text, side, colour in notes:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.85}
        ax.text(at_x, at_y, text, ha=side, va="center", fontsize=10.5, color=colour, bbox=box, zorder=5)
    ax.text(1.73, 1.27, "grey lines: the same error everywhere on a line\nblack squares: what the grid allows",
            ha="right", va="center", fontsize=10, color=INK)  # fmt: skip
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
        title = f"after column {done - 1}: {lost[1][done]:.2f} % lost (RTN: {lost[0][done]:.2f} %)"
        ax.set_title(title if done else "the weights W", loc="left", fontsize=11, color=INK)
        before = states[max(done - 1, 0)]
        for row in range(8):
            for column in range(8):
                value, moved = float(states[done][row, column]), float(states[done][row, column] - before[row, column])
                _cell(ax, row, column, value, DONE if column < done else _shade(moved))
        ax.add_patch(Rectangle((0, TRACED), 8, 1, fc="none", ec=INK, lw=1.8))
        if done:
            ax.add_patch(Rectangle((done - 1, 0), 1, 8, fc="none", ec="#00503a", lw=2.2))
        ax.set(xlim=(-0.05, 8.05), ylim=(8.05, -0.05), aspect="equal")
        ax.axis("off")
    legend = "green: fixed on the grid; dark frame: the column that was rounded in this step\n"
    figure.suptitle(legend + "orange: raised in this step, blue: lowered in this step", fontsize=11)
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
    ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9.5, color=INK)


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
            ax.text(4 * block + 2, 4.35, f"block {block}", ha="center", fontsize=9.5, color=INK)
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        ax.set(xlim=(-0.1, 16.1), ylim=(-2.2, 4.9))
        ax.axis("off")
    axes[0].text(3, -0.25, "fixed", ha="center", va="top", fontsize=10, color="#00503a")
    axes[0].text(7.1, -0.25, "column 6 updates\nonly the rest of\nits own block", ha="center", va="top", fontsize=10, color="#9a5a00")
    axes[0].text(12.9, -0.25, "waits: its updates\nare collected", ha="center", va="top", fontsize=10, color=INK)
    axes[1].text(4, -0.25, "fixed", ha="center", va="top", fontsize=10, color="#00503a")
    axes[1].text(12, -0.25, "one matrix product applies\nall errors of block 1", ha="center", va="top", fontsize=10, color="#9a5a00")
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
            ax.text(29.4, means[-1], f"{name}, {arm[-1]} bits", va="center", fontsize=10, color=colour)
    ax.set(yscale="log", xlabel="decoder layer", xlim=(0, 34.5), ylim=(0.1, 8))
    ax.set_ylabel("% of the output lost (log scale)")
    ax.set_yticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    ax.set_xticks([0, 5, 10, 15, 20, 25, 29])
    ax.minorticks_off()
    bare(ax)
    figure_files.save(figure, path)


# ---- words, bit by bit


def owner_of_bits(bits: int) -> list[list[int]]:
    """Per word of the period, the value that each of its 32 bits belongs to, found by packing one value at a time."""
    config = GPTQConfig(bits)
    num_values = config.pack_unit
    owner = [[-1] * 32 for _ in range(config.num_words(num_values))]
    for value in range(num_values):
        alone = torch.zeros(num_values, 1, dtype=torch.int64)
        alone[value] = 2**bits - 1
        for word, content in enumerate(packing_for(config).pack_rows(alone).flatten().tolist()):
            for bit in range(32):
                if content >> bit & 1:
                    assert owner[word][bit] == -1, "two values share a bit"
                    owner[word][bit] = value
    assert all(value >= 0 for word in owner for value in word)
    return owner


def draw_words(path: Path) -> None:
    """A word of qweight, one of qzeros, and three words of 3 bits."""
    levels4 = torch.tensor([6, 2, 3, 6, 1, 4, 2, 15])
    zeros = torch.full((1, 8), 8)  # symmetric; v1 stores sevens
    levels3 = torch.arange(32) % 8
    four, three = packing_for(GPTQConfig(4)), packing_for(GPTQConfig(3))
    rows = [
        ("qweight, 4 bits: the levels of inputs 0 to 7 for one output (v0 = 6, v1 = 2, ...)",
         int(four.pack_rows(levels4[:, None])), owner_of_bits(4)[0]),
        ("qzeros, 4 bits, v1: the zeros of outputs 0 to 7 in one group, each 8, stored as 7",
         int(four.pack_zeros(zeros)), owner_of_bits(4)[0]),
    ]  # fmt: skip
    words = three.pack_rows(levels3[:, None]).flatten().tolist()
    for word, (content, owner) in enumerate(zip(words, owner_of_bits(3), strict=True)):
        name = f"qweight, 3 bits, word {word} of 3 for 32 inputs (v0 = 0, v1 = 1, ... v7 = 7, v8 = 0, ...)"
        rows.append((name, content, owner))
    figure, ax = plt.subplots(figsize=(9, 5.6), layout="constrained")
    for row, (name, content, owner) in enumerate(rows):
        _draw_word(ax, 2.3 * row, name, content, owner, {10, 21} if row > 1 else set())
    ax.set(xlim=(-0.3, 32.3), ylim=(2.3 * len(rows) - 0.5, -0.9))
    ax.axis("off")
    figure_files.save(figure, path)


def _draw_word(ax: Axes, y: float, name: str, content: int, owner: list[int], split: set[int]) -> None:
    ax.text(0, y - 0.32, f"{name}: 0x{content % 2**32:08X}", ha="left", va="center", fontsize=10, color=INK)
    for bit in range(32):
        x, value = 31 - bit, owner[bit]
        colour = SPLIT if value in split else VALUES[value % 2]
        ax.add_patch(Rectangle((x, y), 1, 0.85, fc=colour, ec=GREY, lw=0.4))
        ax.text(x + 0.5, y + 0.43, str(content >> bit & 1), ha="center", va="center", fontsize=9.5, color=INK)
    for value in dict.fromkeys(owner):
        middle = 31 - sum(bit for bit in range(32) if owner[bit] == value) / owner.count(value)
        ax.text(middle + 0.5, y + 1.17, f"v{value}", ha="center", va="center", fontsize=9, color=INK)


# ---- a line of the cache


def draw_line(path: Path) -> None:
    """The 64 bytes that hold 4 inputs of 32 outputs, and how two instructions take them apart (csrc/int4_layout.h)."""
    figure, ax = plt.subplots(figsize=(9, 4.3), layout="constrained")
    low, high = VALUES
    ax.text(0, 6.55, "one line of the cache: 64 bytes = 128 levels", fontsize=11, color=INK)
    shown = [0, 1, 2, 3, 4, 5, 6, 7, None, 60, 61, 62, 63]
    for place, byte in enumerate(shown):
        x = 1.2 * place
        if byte is None:
            ax.text(x + 0.6, 5.65, "...", ha="center", fontsize=12, color=INK)
            continue
        lane, i = divmod(byte, 4)
        for half, (colour, y) in enumerate(((high, 5.55), (low, 4.85))):
            output = lane + (16 if half == 0 else 0)
            ax.add_patch(Rectangle((x, y), 1.15, 0.65, fc=colour, ec=GREY, lw=0.6))
            ax.text(x + 0.58, y + 0.32, f"o{output} i{i}", ha="center", va="center", fontsize=9, color=INK)
        ax.text(x + 0.58, 4.6, f"byte {byte}", ha="center", va="center", fontsize=9, color=GREY)
    ax.text(15.75, 5.87, "high 4 bits", va="center", fontsize=9.5, color=INK)
    ax.text(15.75, 5.17, "low 4 bits", va="center", fontsize=9.5, color=INK)
    for y, colour, text, first in (
        (3.1, low, "line AND 15: outputs 0 to 15", 0), (1.2, high, "(line >> 4) AND 15: outputs 16 to 31", 16),
    ):  # fmt: skip
        ax.text(0, y + 0.85, text, fontsize=10.5, color=INK)
        for lane in (0, 1, None, 15):
            place = {0: 0, 1: 1, None: 2, 15: 3}[lane]
            x = place * 4.0 - (0 if place < 3 else 2.4)
            if lane is None:
                ax.text(x + 0.7, y + 0.2, "...", ha="center", fontsize=12, color=INK)
                continue
            for i in range(4):
                ax.add_patch(Rectangle((x + 0.93 * i, y), 0.93, 0.65, fc=colour, ec=GREY, lw=0.6))
                ax.text(x + 0.93 * i + 0.46, y + 0.32, f"i{i}", ha="center", va="center", fontsize=9, color=INK)
            ax.text(x + 1.86, y - 0.2, f"lane {lane}: output {first + lane}", ha="center", va="center", fontsize=9, color=INK)
    ax.text(13.6, 2.45, "vpdpbusd: in each of 16 lanes,\n4 levels times the 4 bytes of x,\nadded to the sum of that output",
            va="center", fontsize=10, color=INK)  # fmt: skip
    ax.set(xlim=(-0.1, 18.1), ylim=(0.75, 7))
    ax.axis("off")
    figure_files.save(figure, path)


# ---- the roofline: SmolLM2-135M's linear layers on the reference machine


WEIGHTS = 30 * (576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536)
BF16_BITS, INT4_BITS = 16, 4 + 32 / 64  # groups of 64, each with a scale in fp32
# Vector instructions for 128 weights. csrc/linear.cpp: 4 loads for a tile of 8 rows, and 4 dot products per row.
BF16_PER_ROW = 4 + 4 / 8
# csrc/int4.cpp: load, shift and two ands for a tile of 6 rows; 4 dot products per row; and per row 10 for each group of
# 64 inputs, which is 16 times 128 weights (32 outputs).
INT4_PER_TILE, INT4_TILE_ROWS, INT4_PER_ROW = 4, 6, 4 + 10 / 16
CROSSOVER = 10  # as the page says


def bf16_ms(tokens: int) -> float:
    """Milliseconds for all linear layers, `tokens` at once."""
    cpu = HARDWARE["cpu"]
    return 1e3 * max(WEIGHTS * BF16_BITS / 8 / cpu.bandwidth, 2 * WEIGHTS * tokens / cpu.flops)


def int4_ms(tokens: int) -> float:
    """The same with 4 bits, unpacked anew for every tile of up to 6 tokens."""
    cpu = HARDWARE["cpu"]
    instructions = tokens * INT4_PER_ROW + -(-tokens // INT4_TILE_ROWS) * INT4_PER_TILE
    return 1e3 * max(WEIGHTS * INT4_BITS / 8 / cpu.bandwidth, 2 * WEIGHTS / cpu.flops * instructions / BF16_PER_ROW)


def draw_roofline(path: Path) -> None:
    tokens = list(range(1, 33))
    crossover = max(n for n in tokens if int4_ms(n) <= bf16_ms(n))
    assert crossover == CROSSOVER
    measured = (result("bench_gptq.json")["arms"]["speed"]["crossover"], 8)
    figure, ax = plt.subplots(figsize=(9, 3.9), layout="constrained")
    ax.axvspan(*measured, color="#e6e6e6", zorder=0)
    ax.text(sum(measured) / 2, 17.4, "measured:\n6 to 8", ha="center", va="top", fontsize=9.5, color=INK)
    ax.plot(tokens, [bf16_ms(n) for n in tokens], color=BF16, lw=2.4)
    ax.plot(tokens, [int4_ms(n) for n in tokens], color=INT4, lw=2.4)
    ax.text(19.3, 7.6, "packed bf16", fontsize=10.5, color=BF16)
    ax.text(19.3, 13.6, "4 bits", ha="right", fontsize=10.5, color=INT4)
    for n, time, text, dx, dy in (
        (1, bf16_ms(1), f"1 token, bf16: {bf16_ms(1):.1f} ms of reading", 0.3, 0.7),
        (1, int4_ms(1), f"1 token, 4 bits: {int4_ms(1):.1f} ms of reading", 1.2, -0.9),
    ):
        ax.text(n + dx, time + dy, text, fontsize=9.5, color=INK)
    ax.text(13.4, 5.2, "from 13 tokens on, arithmetic limits bf16", fontsize=9.5, color=BF16)
    ax.plot(crossover, int4_ms(crossover), "o", color=INK, ms=7)
    note = f"modelled crossover:\nup to {crossover} tokens\n4 bits are faster"
    place = {"xytext": (crossover + 2.2, 0.9), "fontsize": 9.5, "color": INK}
    ax.annotate(note, (crossover, int4_ms(crossover)), arrowprops={"arrowstyle": "-", "color": GREY}, **place)
    ax.set(xlabel="tokens in the step", ylabel="ms for the linear layers (modelled)", xlim=(1, 32), ylim=(0, 18))
    ax.set_xticks([1, 4, 6, 8, 10, 13, 16, 20, 24, 28, 32])
    bare(ax)
    figure_files.save(figure, path)


# ---- what others report: the table of the page, drawn


SIZES = {"125M": 0.125, "350M": 0.35, "560M": 0.56}


def reported() -> list[tuple[str, float, float, float]]:
    """(model, billions of parameters, rise in percent with RTN, with GPTQ), 4 bits, from the table on page 07b."""
    found = []
    for line in (PAGES / "07b_gptq_in_practice.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        size = re.match(r"(?:OPT|BLOOM|LLaMA)-([\d.]+)([MB])$", cells[0])
        if size and len(cells) == 7:
            billions = float(size[1]) / (1000 if size[2] == "M" else 1)
            plain, nearest, fitted = (float(cell.split()[0]) for cell in cells[1:4])
            found.append((cells[0], billions, 100 * (nearest / plain - 1), 100 * (fitted / plain - 1)))
    assert len(found) >= 14
    return found


def draw_sizes(path: Path) -> None:
    figure, ax = plt.subplots(figsize=(9, 3.9), layout="constrained")
    for family, marker in (("OPT", "o"), ("BLOOM", "s"), ("LLaMA", "^")):
        rows = [row for row in reported() if row[0].startswith(family)]
        for column, colour in ((2, RTN), (3, FITTED)):
            ax.plot([row[1] for row in rows], [row[column] for row in rows], marker + "-", color=colour, ms=6, lw=1, alpha=0.85)
    ours = perplexities()
    for method, colour in (("RTN", RTN), ("GPTQ", FITTED)):
        rise = 100 * (ours[method, 4] / ours[None, 16] - 1)
        ax.plot(0.135, rise, "*", color=colour, ms=15, mec=INK)
        ax.text(0.115, rise, f"{rise:.0f} %", ha="right", va="center", fontsize=10, color=colour)
    ax.text(0.165, 44, "star: SmolLM2-135M, on this page", fontsize=9.5, color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    ax.text(75, 500, "OPT-66B", fontsize=9.5, color=RTN)
    ax.text(1.9, 330, "rounded to nearest (RTN)", fontsize=11, color=RTN)
    ax.text(1.4, 1.0, "GPTQ", fontsize=11, color=FITTED)
    ax.text(0.075, 0.33, "circles: OPT, squares: BLOOM, triangles: LLaMA", fontsize=9.5, color=INK)
    ax.set(xscale="log", yscale="log", xlabel="parameters", xlim=(0.07, 260), ylim=(0.25, 1600))
    ax.set_ylabel("rise of perplexity at 4 bits")
    ax.set_xticks([0.1, 1, 10, 100], ["0.1 billion", "1 billion", "10 billion", "100 billion"])
    ax.set_yticks([1, 10, 100, 1000], ["1 %", "10 %", "100 %", "1,000 %"])
    ax.minorticks_off()
    bare(ax)
    figure_files.save(figure, path)


FIGURES = {
    "07_perplexity": draw_perplexity, "07_grid": draw_grid, "07_two_inputs": draw_two_inputs,
    "07_columns": draw_columns, "07_blocks": draw_blocks, "07_layers": draw_layers,
    "07_words": draw_words, "07_line": draw_line, "07_roofline": draw_roofline, "07_sizes": draw_sizes,
}  # fmt: skip


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
