"""Draw the pictures of docs/learn/07b: words bit by bit, a line of the cache, the roofline, what others report.

Milestone: M7. vLLM counterpart: none. No weights, a few seconds:

    python scripts/dev/draw_int4_figures.py [--out docs/learn/img]

Every bit comes from the engine's own packing. Only the roofline is a model: two measured rates and a count of
instructions; what the page quotes of it is asserted here.
"""

import re
from pathlib import Path

import figure_files
import torch
from draw_gptq_figures import GREY, INK, bare, note, perplexities, result
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.gptq_config import GPTQConfig
from folovllm.learn import int4_cost
from folovllm.model_executor.cpu.int4_crossover import GUESS
from folovllm.model_executor.layers.quantization.packing import packing_for

BF16, INT4 = "#0072B2", "#D55E00"
VALUES = ("#cfe8dd", "#f6d9b8")  # neighbouring values in a word take turns
SPLIT = "#e78ac3"  # a value that lies across two words


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
        ("qweight, 4 bits: the levels of inputs 0 to 7 for one output (a0 = 6, a1 = 2, ...)",
         int(four.pack_rows(levels4[:, None])), owner_of_bits(4)[0]),
        ("qzeros, 4 bits, v1: the zeros z0 to z7 of outputs 0 to 7 in one group, each 8, stored as 7",
         int(four.pack_zeros(zeros)), owner_of_bits(4)[0]),
    ]  # fmt: skip
    words = three.pack_rows(levels3[:, None]).flatten().tolist()
    for word, (content, owner) in enumerate(zip(words, owner_of_bits(3), strict=True)):
        name = f"qweight, 3 bits, word {word} of 3 for 32 inputs (a0 = 0, a1 = 1, ... a7 = 7, a8 = 0, ...)"
        rows.append((name, content, owner))
    figure, ax = plt.subplots(figsize=(9, 5.6), layout="constrained")
    for row, (name, content, owner) in enumerate(rows):
        letter = "z" if name.startswith("qzeros") else "a"
        _draw_word(ax, 2.3 * row, name, content, owner, {10, 21} if row > 1 else set(), letter)
    note(ax, 0, -1.15, "bit 31, the highest", colour=GREY, size=9.5)
    note(ax, 32, -1.15, "bit 0, the lowest", colour=GREY, size=9.5, ha="right")
    ax.set(xlim=(-0.3, 32.3), ylim=(2.3 * len(rows) - 0.5, -1.6))
    ax.axis("off")
    figure_files.save(figure, path)


def _draw_word(ax: Axes, y: float, name: str, content: int, owner: list[int], split: set[int], letter: str) -> None:
    note(ax, 0, y - 0.32, f"{name}: 0x{content % 2**32:08X}", ha="left", va="center")
    for bit in range(32):
        x, value = 31 - bit, owner[bit]
        colour = SPLIT if value in split else VALUES[value % 2]
        ax.add_patch(Rectangle((x, y), 1, 0.85, fc=colour, ec=GREY, lw=0.4))
        note(ax, x + 0.5, y + 0.43, str(content >> bit & 1), ha="center", va="center", size=9.5)
    for value in dict.fromkeys(owner):
        middle = 31 - sum(bit for bit in range(32) if owner[bit] == value) / owner.count(value)
        note(ax, middle + 0.5, y + 1.17, f"{letter}{value}", ha="center", va="center", size=9)


# ---- a line of the cache


def draw_line(path: Path) -> None:
    """The 64 bytes that hold 4 inputs of 32 outputs, and how two instructions take them apart (csrc/int4_layout.h)."""
    figure, ax = plt.subplots(figsize=(9, 4.3), layout="constrained")
    low, high = VALUES
    note(
        ax, 0, 6.55, "one cache line: 64 bytes = 128 levels        o16 i0: the level of output 16 for input 0", size=11
    )
    shown = [0, 1, 2, 3, 4, 5, 6, 7, None, 60, 61, 62, 63]
    for place, byte in enumerate(shown):
        x = 1.2 * place
        if byte is None:
            note(ax, x + 0.6, 5.65, "...", ha="center", size=12)
            continue
        lane, i = divmod(byte, 4)
        for half, (colour, y) in enumerate(((high, 5.55), (low, 4.85))):
            output = lane + (16 if half == 0 else 0)
            ax.add_patch(Rectangle((x, y), 1.15, 0.65, fc=colour, ec=GREY, lw=0.6))
            note(ax, x + 0.58, y + 0.32, f"o{output} i{i}", ha="center", va="center", size=9)
        note(ax, x + 0.58, 4.6, f"byte {byte}", ha="center", va="center", colour=GREY, size=9)
    note(ax, 15.75, 5.87, "high 4 bits", va="center", size=9.5)
    note(ax, 15.75, 5.17, "low 4 bits", va="center", size=9.5)
    for y, colour, text, first in (
        (3.1, low, "line AND 15: outputs 0 to 15", 0), (1.2, high, "(line >> 4) AND 15: outputs 16 to 31", 16),
    ):  # fmt: skip
        note(ax, 0, y + 0.85, text, size=10.5)
        for lane in (0, 1, None, 15):
            place = {0: 0, 1: 1, None: 2, 15: 3}[lane]
            x = place * 4.0 - (0 if place < 3 else 2.4)
            if lane is None:
                note(ax, x + 0.7, y + 0.2, "...", ha="center", size=12)
                continue
            for i in range(4):
                ax.add_patch(Rectangle((x + 0.93 * i, y), 0.93, 0.65, fc=colour, ec=GREY, lw=0.6))
                note(ax, x + 0.93 * i + 0.46, y + 0.32, f"i{i}", ha="center", va="center", size=9)
            note(ax, x + 1.86, y - 0.2, f"lane {lane}: output {first + lane}", ha="center", va="center", size=9)
    note(
        ax,
        13.6,
        2.45,
        "vpdpbusd: in each of 16 lanes,\n4 levels times the 4 bytes of x,\nadded to the sum of that output",
        va="center",
    )
    ax.set(xlim=(-0.1, 18.1), ylim=(0.75, 7))
    ax.axis("off")
    figure_files.save(figure, path)


# ---- the roofline: SmolLM2-135M's linear layers on the reference machine


CROSSOVER = 9  # as the page says
BF16_BITS, INT4_BITS, linear_ms = int4_cost.BF16, int4_cost.INT4, int4_cost.linear_ms


def draw_roofline(path: Path) -> None:
    tokens = list(range(1, 33))
    crossover = int4_cost.crossover()
    assert crossover == CROSSOVER
    assert [round(linear_ms(INT4_BITS, n), 2) for n in (CROSSOVER, CROSSOVER + 1)] == [5.72, 6.19]  # as the page says
    measured = (result("bench_gptq.json")["arms"]["speed"]["crossover"], GUESS)
    figure, ax = plt.subplots(figsize=(9, 3.9), layout="constrained")
    ax.axvspan(*measured, color="#e6e6e6", zorder=0)
    note(ax, sum(measured) / 2, 19.4, f"measured:\n{measured[0]} to {measured[1]}", ha="center", va="top", size=9.5)
    ax.plot(tokens, [linear_ms(BF16_BITS, n) for n in tokens], color=BF16, lw=2.4)
    ax.plot(tokens, [linear_ms(INT4_BITS, n) for n in tokens], color=INT4, lw=2.4)
    note(ax, 19.3, 7.6, "packed bf16", colour=BF16, size=10.5)
    note(ax, 19.3, 13.6, "4 bits", ha="right", colour=INT4, size=10.5)
    for n, time, text, dx, dy in (
        (
            1,
            linear_ms(BF16_BITS, 1),
            f"1 token, bf16: {linear_ms(BF16_BITS, 1):.1f} ms of reading",
            0.3,
            0.7,
        ),
        (
            1,
            linear_ms(INT4_BITS, 1),
            f"1 token, 4 bits: {linear_ms(INT4_BITS, 1):.1f} ms of reading",
            1.2,
            -0.9,
        ),
    ):
        note(ax, n + dx, time + dy, text, size=9.5)
    tile = 25  # where the fifth tile of 6 rows begins
    arrow = {"arrowstyle": "->", "color": INT4}
    at = {"xytext": (20.6, 18.2), "fontsize": 9.5, "color": INT4, "ha": "center", "va": "center"}
    ax.annotate("a bend: one more\ntile of 6 rows", (tile, linear_ms(INT4_BITS, tile)), arrowprops=arrow, **at)
    note(ax, 13.4, 5.2, "from 13 tokens on, arithmetic limits bf16", colour=BF16, size=9.5)
    ax.plot(crossover, linear_ms(INT4_BITS, crossover), "o", color=INK, ms=7)
    told = f"modelled crossover:\nup to {crossover} tokens\n4 bits are faster"
    place = {"xytext": (crossover + 2.2, 0.9), "fontsize": 9.5, "color": INK}
    ax.annotate(
        told,
        (crossover, linear_ms(INT4_BITS, crossover)),
        arrowprops={"arrowstyle": "-", "color": GREY},
        **place,
    )
    ax.set(xlabel="tokens in the step", ylabel="ms for the linear layers (modelled)", xlim=(1, 32), ylim=(0, 20))
    ax.set_xticks([1, 4, 6, 8, 10, 13, 16, 20, 24, 28, 32])
    ax.set_yticks([0, 5, 10, 15, 20])
    bare(ax)
    figure_files.save(figure, path)


# ---- what others report: the table of the page, drawn


PAGE = figure_files.ROOT / "docs/learn/07b_gptq_in_practice.md"


def reported() -> list[tuple[str, float, float, float]]:
    """(model, billions of parameters, rise in percent with RTN, with GPTQ), 4 bits, from the table on page 07b."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        size = re.match(r"(?:OPT|BLOOM|LLaMA)-([\d.]+)([MB])$", cells[0])
        if size and len(cells) == 7:
            billions = float(size[1]) / (1000 if size[2] == "M" else 1)
            plain, nearest, fitted = (float(cell.split()[0]) for cell in cells[1:4])
            found.append((cells[0], billions, 100 * (nearest / plain - 1), 100 * (fitted / plain - 1)))
    assert len(found) >= 14
    return found


FAMILIES = {"OPT": "#555555", "BLOOM": "#009E73", "LLaMA": "#CC79A7"}


def draw_sizes(path: Path) -> None:
    """One panel per method, one line per family."""
    ours = perplexities()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    for ax, method, column in zip(axes, ("RTN", "GPTQ"), (2, 3), strict=True):
        for family, colour in FAMILIES.items():
            rows = [row for row in reported() if row[0].startswith(family)]
            rises = [row[column] for row in rows]
            ax.plot([row[1] for row in rows], rises, "o-", color=colour, ms=5, lw=1.6)
            ax.annotate(family, (rows[-1][1], rises[-1]), (7, 0), textcoords="offset points", va="center",
                        color=colour, fontsize=10.5)  # fmt: skip
        rise = 100 * (ours[method, 4] / ours[None, 16] - 1)
        ax.plot(0.135, rise, "*", color=INK, ms=14)
        note(ax, 0.11, rise * 1.5, f"{rise:.1f} %", size=9.5)
        ax.set_title({"RTN": "rounded to nearest (RTN)", "GPTQ": "GPTQ"}[method], loc="left", fontsize=11, color=INK)
        ax.set(xscale="log", yscale="log", xlabel="billions of parameters", xlim=(0.09, 1500), ylim=(0.25, 1600))
        ax.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
        ax.minorticks_off()
        bare(ax)
    note(axes[0], 9, 1100, "OPT-66B", colour=FAMILIES["OPT"], size=9.5)
    note(axes[0], 1.3, 290, "OPT-1.3B", colour=FAMILIES["OPT"], size=9.5, ha="center")
    axes[0].set_ylabel("rise of perplexity at 4 bits")
    axes[0].set_yticks([1, 10, 100, 1000], ["1 %", "10 %", "100 %", "1,000 %"])
    told = "star: SmolLM2-135M, on this page,\nwith another text and groups of 64"
    note(axes[0], 0.1, 0.3, told, size=9.5)
    figure_files.save(figure, path)


FIGURES = {
    "07_words": draw_words,
    "07_line": draw_line,
    "07_roofline": draw_roofline,
    "07_sizes": draw_sizes,
}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
