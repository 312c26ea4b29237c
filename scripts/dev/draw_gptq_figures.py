"""Draw the pictures of docs/learn/07: a layer quantised column by column, the packed bits, and the roofline.

Milestone: M7. vLLM counterpart: none. No weights, a few seconds:

    python scripts/dev/draw_gptq_figures.py [--out docs/learn/img]

Every number and every bit comes from the quantiser's own functions; what the page quotes is asserted here. Only the
roofline is a model: two rates and a count of instructions, no measurement.
"""

import sys
from pathlib import Path

import figure_files
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tests.m7.example_layer

from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.layers.quantization.packing import packing_for
from folovllm.quantize.gptq import GPTQ, output_error, rtn_quantize
from folovllm.quantize.grid import Grid
from tests.m7.example_layer import example_layer

INK, DONE, RAISED, LOWERED, PLAIN = "#333333", "#9fcbbb", "#fdc086", "#a6cee3", "#ffffff"
VALUES = ("#cfe8dd", "#f6d9b8")  # neighbouring values in a word take turns
SPLIT = "#e78ac3"  # a value that lies across two words
SHOWN = (0, 1, 2, 4, 6, 8)  # after so many columns
TRACED = 2  # the output that the page follows
CONFIG = GPTQConfig(bits=3)  # one group per output
NEAREST, FITTED = 2.90, 1.35  # percent of |W X|^2, as the page says

# The roofline: SmolLM2-135M's linear layers on the development machine, as in docs/learn/06.
WEIGHTS = 30 * (576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536)
BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 39e9, 0.85e12
BF16_BITS, INT4_BITS = 16, 4 + 32 / 64  # groups of 64, each with a scale in fp32
# Vector instructions for 128 weights. csrc/linear.cpp: 4 loads for a tile of 8 rows, and 4 dot products per row.
BF16_PER_ROW = 4 + 4 / 8
# csrc/int4.cpp: load, shift and two ands for a tile of 6 rows; 4 dot products per row; and per row 10 for each group of
# 64 inputs, which is 16 times 128 weights (32 outputs).
INT4_PER_TILE, INT4_TILE_ROWS, INT4_PER_ROW = 4, 6, 4 + 10 / 16


# ---- the 8 x 8 layer


def columns() -> list[torch.Tensor]:
    """The weights after 0, 1, ... 8 columns: [8, 8] each."""
    weight, hessian = example_layer()
    gptq = GPTQ(CONFIG)
    grid, root = Grid.find(weight, CONFIG), gptq.damped_root(hessian)
    states, work = [weight.clone()], weight.clone()
    for i in range(8):
        gptq.step(work, i, grid.values(grid.levels(work[:, i])), root)
        states.append(work.clone())
    nearest = rtn_quantize(weight, CONFIG).dequantize()
    errors = [100 * output_error(weight, quantized, hessian) for quantized in (nearest, work)]
    assert [round(error, 2) for error in errors] == [NEAREST, FITTED]
    return states


def draw_columns(path: Path) -> None:
    states = columns()
    figure, axes = plt.subplots(2, 3, figsize=(10, 6.9), layout="constrained")
    for ax, done in zip(axes.flat, SHOWN, strict=True):
        title = f"after column {done - 1}" if done else "W: 8 outputs, 8 inputs"
        ax.set_title(title, loc="left", fontsize=9, color=INK)
        for row in range(8):
            for column in range(8):
                moved = float(states[done][row, column] - states[0][row, column])
                _cell(ax, row, column, float(states[done][row, column]), _colour(column < done, moved))
        ax.add_patch(Rectangle((0, TRACED), 8, 1, fc="none", ec=INK, lw=1.4))
        ax.set(xlim=(-0.05, 8.05), ylim=(8.05, -0.05), aspect="equal")
        ax.axis("off")
    legend = "green: rounded and fixed; orange: raised, blue: lowered by 0.005 or more to make up for it; framed: row 2"
    figure.suptitle(legend, fontsize=9)
    figure_files.save(figure, path)


def _colour(fixed: bool, moved: float) -> str:
    if fixed:
        return DONE
    return RAISED if moved >= 0.005 else LOWERED if moved <= -0.005 else PLAIN


def _cell(ax: Axes, row: int, column: int, value: float, colour: str) -> None:
    ax.add_patch(Rectangle((column, row), 1, 1, fc=colour, ec="#999999", lw=0.5))
    text = f"{value:.2f}".replace("-0.00", "0.00")
    ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=INK)


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
        ("qweight, 4 bits:\ninputs 0 to 7 of one output", int(four.pack_rows(levels4[:, None])), owner_of_bits(4)[0]),
        ("qzeros, 4 bits, v1:\noutputs 0 to 7 of one group", int(four.pack_zeros(zeros)), owner_of_bits(4)[0]),
    ]
    words = three.pack_rows(levels3[:, None]).flatten().tolist()
    for word, (content, owner) in enumerate(zip(words, owner_of_bits(3), strict=True)):
        rows.append((f"qweight, 3 bits, word {word}:\ninputs 0 to 31 in three", content, owner))
    figure, ax = plt.subplots(figsize=(10, 3.9), layout="constrained")
    for row, (name, content, owner) in enumerate(rows):
        _draw_word(ax, 1.7 * row, name, content, owner, {10, 21} if row > 1 else set())
    ax.text(0.5, -0.75, "bit 31", ha="center", fontsize=7, color=INK)
    ax.text(31.5, -0.75, "bit 0", ha="center", fontsize=7, color=INK)
    ax.set(xlim=(-8.5, 32.2), ylim=(1.7 * len(rows) - 0.3, -1))
    ax.axis("off")
    figure_files.save(figure, path)


def _draw_word(ax: Axes, y: float, name: str, content: int, owner: list[int], split: set[int]) -> None:
    ax.text(-0.3, y + 0.4, name, ha="right", va="center", fontsize=8, color=INK)
    for bit in range(32):
        x, value = 31 - bit, owner[bit]
        colour = SPLIT if value in split else VALUES[value % 2]
        ax.add_patch(Rectangle((x, y), 1, 0.8, fc=colour, ec="#999999", lw=0.4))
        ax.text(x + 0.5, y + 0.4, str(content >> bit & 1), ha="center", va="center", fontsize=8, color=INK)
    for value in dict.fromkeys(owner):
        middle = 31 - sum(bit for bit in range(32) if owner[bit] == value) / owner.count(value)
        ax.text(middle + 0.5, y + 1.05, f"v{value}", ha="center", va="center", fontsize=7, color=INK)


# ---- the roofline


def bf16_ms(rows: int) -> float:
    """Milliseconds for all linear layers, `rows` tokens at once."""
    moving = WEIGHTS * BF16_BITS / 8 / BYTES_PER_SECOND
    return 1e3 * max(moving, 2 * WEIGHTS * rows / OPERATIONS_PER_SECOND)


def int4_ms(rows: int) -> float:
    """The same with 4 bits, unpacked anew for every tile of up to 6 rows."""
    moving = WEIGHTS * INT4_BITS / 8 / BYTES_PER_SECOND
    instructions = rows * INT4_PER_ROW + -(-rows // INT4_TILE_ROWS) * INT4_PER_TILE
    return 1e3 * max(moving, 2 * WEIGHTS / OPERATIONS_PER_SECOND * instructions / BF16_PER_ROW)


def crossover() -> int:
    """The number of rows up to which 4 bits take no longer."""
    return max(rows for rows in range(1, 65) if int4_ms(rows) <= bf16_ms(rows))


def draw_roofline(path: Path) -> None:
    rows = list(range(1, 49))
    figure, ax = plt.subplots(figsize=(10, 3.2), layout="constrained")
    ax.plot(rows, [bf16_ms(n) for n in rows], color="#0072B2", lw=2, label="bf16")
    ax.plot(rows, [int4_ms(n) for n in rows], color="#D55E00", lw=2, label='4 bits (gptq_runtime="memory")')
    both = [int4_ms(n) if n <= crossover() else bf16_ms(n) for n in rows]
    ax.plot(rows, both, color="black", lw=1, ls="--", label='"speed": the better of the two')
    ax.axvline(crossover() + 0.5, color="#999999", lw=0.8, ls=":")
    ax.text(crossover() + 0.8, 0.4, f"from {crossover() + 1} rows on bf16 is faster", fontsize=8, color=INK)
    ax.set(xlabel="tokens multiplied at once", ylabel="ms for the linear layers", xlim=(1, 48), ylim=(0, None))
    ax.legend(fontsize=8, frameon=False, loc="upper left")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    figure_files.save(figure, path)


FIGURES = {"07_columns": draw_columns, "07_words": draw_words, "07_roofline": draw_roofline}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
