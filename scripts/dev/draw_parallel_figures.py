"""Draws the pictures of docs/learn/09: two cuts, a layer on three ranks, a ring, a decode step, six ranks, the bubble.

Milestone: M9. vLLM counterpart: none. No torch, no weights, a few seconds:

    python scripts/dev/draw_parallel_figures.py [--out docs/learn/img]

Nothing is typed in by hand. What a rank holds comes from ModelShard, the products and the ring are computed, and the
batches of the pipeline are those that the real scheduler makes on the fake model.
"""

from pathlib import Path
from typing import Any

import figure_files
from figure_shapes import COLOURS, INK, LINE, ON, PALE, TEXT, arrow, canvas, cell, note, panel, save
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.communication_plan import ALL_REDUCE, CommunicationPlan
from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.fake_pipeline import FakePipeline
from folovllm.hf_config import ModelArchitecture
from folovllm.learn.toy_engine import make_core, make_request
from folovllm.model_shapes import shape_architecture
from folovllm.parallel import ModelShard, ParallelConfig
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.links import LINKS, operation_seconds
from folovllm.utils import cdiv

RANKS = ("a", "b", "c")  # keys of COLOURS: a rank has one colour in all pictures
X, SIZE = [1, 2, 3, 4], 4
W = [[row * SIZE + column for column in range(SIZE)] for row in range(SIZE)]
ARCH = shape_architecture("smollm2-135m")
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


def product(rows: range, columns: range) -> list[int]:
    """x @ W over some inputs (`rows`), for some outputs (`columns`)."""
    return [sum(X[row] * W[row][column] for row in rows) for column in columns]


# ---- two cuts of one product

CELL = 0.42


def numbers(axes: Axes, x: float, y: float, rows: list[list[Any]], fills: list[list[str]]) -> None:
    """A matrix whose upper left corner is (x, y)."""
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            cell(axes, x + j * CELL, y - (i + 1) * CELL, CELL, CELL, str(value), fills[i][j])


def two_cuts(path: Path) -> None:
    axes = canvas(7.9, 5.2)
    whole, halves = range(SIZE), (range(2), range(2, 4))
    by_columns = "By columns: two outputs each, complete; they lie side by side"
    by_rows = "By rows: all outputs, each in part; the ranks add them up"
    for top, title, is_by_columns in ((5.0, by_columns, True), (2.4, by_rows, False)):
        note(axes, 0.15, top - 0.02, title, size=11, weight="bold")
        owner = [[RANKS[(j if is_by_columns else i) // 2] for j in whole] for i in whole]
        fills = [[PALE[name] for name in row] for row in owner]
        x_fills = [TEXT] * SIZE if is_by_columns else [PALE[RANKS[i // 2]] for i in whole]
        note(axes, 0.15, top - 0.85, "x", size=11)
        numbers(axes, 0.4, top - 0.62, [X], [x_fills])
        note(axes, 2.35, top - 0.85, "W", size=11)
        numbers(axes, 2.6, top - 0.3, W, fills)
        arrow(axes, (4.4, top - 1.15), (4.85, top - 1.15))
        for rank, half in enumerate(halves):
            rows, columns = (whole, half) if is_by_columns else (half, whole)
            y = top - 0.42 - rank * 0.85
            note(axes, 5.0, y - 0.21, f"rank {rank}", color=COLOURS[RANKS[rank]], weight="bold")
            offset = 2 * rank * CELL if is_by_columns else 0
            result = product(rows, columns)
            numbers(axes, 5.75 + offset, y, [result], [[PALE[RANKS[rank]]] * len(result)])
    numbers(axes, 5.75, 0.42, [product(whole, whole)], [[TEXT] * SIZE])
    note(axes, 5.0, 0.21, "x W =", weight="bold")
    save(axes, path)


# ---- one layer on three ranks


def layer(path: Path) -> None:
    """The pairs of matrices of one decoder layer, with the sizes that each rank has."""
    axes = canvas(9, 4.1)
    shards = [ParallelConfig(tensor_parallel_size=3).shard(rank) for rank in range(3)]
    inner = ARCH.intermediate_size // 3
    whole = f"hidden\n{ARCH.hidden_size}"
    for x in (0.1, 4.25, 8.3):
        panel(axes, x, 0.45, 0.6, 2.95, TEXT)
        axes.text(x + 0.3, 1.92, whole, ha="center", va="center", size=9.5, color=INK, rotation=90)
    for x, title in ((0.95, "attention"), (5.1, "MLP")):
        note(axes, x, 3.75, title, size=11, weight="bold")
    for rank, shard in enumerate(shards):
        mine, y = shard.attention_arch(ARCH), 2.65 - rank * 1.05
        colour = PALE[RANKS[rank]]
        heads = f"{mine.num_attention_heads} heads\n{mine.num_key_value_heads} KV head"
        for x, text in ((0.95, "qkv\ncolumns"), (1.75, heads), (2.65, "o\nrows")):
            panel(axes, x, y, 0.72 if x != 1.75 else 0.82, 0.75, colour, COLOURS[RANKS[rank]])
            axes.text(x + (0.36 if x != 1.75 else 0.41), y + 0.37, text, ha="center", va="center", size=9, color=INK)
        for x, text in ((5.1, "gate, up\ncolumns"), (5.95, f"silu\n{inner}"), (6.7, "down\nrows")):
            panel(axes, x, y, 0.78 if x == 5.1 else 0.68, 0.75, colour, COLOURS[RANKS[rank]])
            axes.text(x + (0.39 if x == 5.1 else 0.34), y + 0.37, text, ha="center", va="center", size=9, color=INK)
        for start, end in ((0.72, 0.93), (3.39, 3.6), (4.87, 5.08), (7.4, 7.62)):
            arrow(axes, (start, y + 0.37), (end, y + 0.37))
    for x in (3.62, 7.64):
        panel(axes, x, 0.45, 0.36, 2.95, "white", INK)
        axes.text(
            x + 0.18, 1.92, "all-reduce", ha="center", va="center", size=10, color=INK, rotation=90, weight="bold"
        )
        arrow(axes, (x + 0.38, 1.92), (x + 0.62, 1.92))
    colours = "Blue, yellow, green: ranks 0, 1 and 2 of SmolLM2-135M. Grey: whole on every rank."
    note(axes, 0.1, 0.2, f"{colours} Norms and residual additions are left out.", size=9)
    save(axes, path)


# ---- a ring all-reduce


def ring_states(size: int) -> list[list[list[set[int]]]]:
    """Hop -> rank -> piece -> the ranks whose terms are in it."""
    state = [[{rank} for _ in range(size)] for rank in range(size)]
    states = [[[set(piece) for piece in pieces] for pieces in state]]
    for hop in range(2 * (size - 1)):
        adds = hop < size - 1
        moved = []
        for rank in range(size):
            piece = piece_sent(rank, hop, size)
            moved.append((piece, set(state[rank][piece])))
        for rank, (piece, terms) in enumerate(moved):
            target = state[(rank + 1) % size]
            target[piece] = target[piece] | terms if adds else terms
        states.append([[set(piece) for piece in pieces] for pieces in state])
    assert all(piece == set(range(size)) for pieces in state for piece in pieces)
    return states


def piece_sent(rank: int, hop: int, size: int) -> int:
    """The piece that a rank sends to its neighbour in a hop."""
    return (rank - hop) % size


def ring(path: Path) -> None:
    states, size = ring_states(3), 3
    axes = canvas(9, 3.35)
    titles = ["at the start", *(f"hop {hop}: {'add' if hop < size else 'pass on'}" for hop in range(1, 5))]
    note(
        axes, 0.05, 3.2, "Three pieces per rank. A coloured strip is the term of that rank; black: the sum is complete."
    )
    for column, (title, state) in enumerate(zip(titles, states, strict=True)):
        x = 0.75 + column * 1.66
        note(axes, x, 2.88, title, size=9.5, weight="bold")
        for rank, pieces in enumerate(state):
            y = 2.1 - rank * 0.75
            if column == 0:
                note(axes, 0.05, y + 0.25, f"rank {rank}", color=COLOURS[RANKS[rank]], weight="bold", size=9.5)
            for number, terms in enumerate(pieces):
                is_complete = len(terms) == size
                left = x + number * 0.47
                axes.add_patch(Rectangle((left, y), 0.44, 0.5, fc=INK if is_complete else "white", ec=LINE, lw=1))
                for term in terms if not is_complete else ():
                    axes.add_patch(
                        Rectangle((left + 0.02 + term * 0.135, y + 0.03), 0.125, 0.44, fc=COLOURS[RANKS[term]])
                    )
                if is_complete:
                    axes.text(left + 0.22, y + 0.25, "sum", ha="center", va="center", size=8, color="white")
            if column < len(states) - 1:
                _sends(axes, x, y, rank, column, size)
    note(
        axes,
        0.05,
        0.12,
        "Arrows: the piece that a rank sends next, to the rank below it; rank 2 sends to rank 0.",
        size=9,
    )
    save(axes, path)


def _sends(axes: Axes, x: float, y: float, rank: int, hop: int, size: int) -> None:
    """An arrow from the piece that `rank` sends in this hop."""
    middle = x + piece_sent(rank, hop, size) * 0.47 + 0.22
    arrow(axes, (middle, y - 0.02), (middle, y - 0.23), COLOURS[RANKS[rank]])


# ---- a decode step on cards


def decode(path: Path) -> None:
    """Reading the weights of Qwen3-8B and the all-reduces of one token, by the number of H100 and the link."""
    arch, sizes = shape_architecture("qwen3-8b"), (1, 2, 4, 8)
    alone = 1e3 * arch.num_parameters() * 2 / HARDWARE["h100"].bandwidth
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    for ax, name in zip(axes, ("nvlink4", "100gbe"), strict=True):
        reads, talks = [alone / n for n in sizes], [1e3 * _talk(arch, n, name) for n in sizes]
        names = [str(n) for n in sizes]
        ax.bar(names, reads, color=COLOURS["a"], label="reading the weights")
        bars = ax.bar(names, talks, bottom=reads, color=COLOURS["b"], label="all-reduces")
        ax.bar_label(bars, [f"{sum(pair):.1f} ms" for pair in zip(reads, talks, strict=True)], fontsize=9)
        ax.set(title=LINKS[name].name, xlabel="cards", ylim=(0, 1.5 * alone))
    axes[0].set_ylabel("ms per token")
    axes[0].legend(frameon=False, fontsize=9)
    figure_files.save(figure, path)


def _talk(arch: ModelArchitecture, size: int, link: str) -> float:
    """Seconds of the all-reduces of one token."""
    plan = CommunicationPlan(arch, ModelShard(tp_size=size))
    calls, payload = plan.calls(1).get(ALL_REDUCE, 0), plan.bytes(1, 1).get(ALL_REDUCE, 0)
    return operation_seconds(LINKS[link], ALL_REDUCE, size, calls, payload)


# ---- six ranks


def six_ranks(path: Path) -> None:
    """SmolLM2-135M on three parts and two stages."""
    config = ParallelConfig(tensor_parallel_size=3, pipeline_parallel_size=2)
    axes = canvas(9, 4.2)
    rows = cdiv(ARCH.vocab_size, 3)
    for rank in range(config.world_size):
        shard = config.shard(rank)
        mine, layers = shard.attention_arch(ARCH), shard.layers(ARCH.num_hidden_layers)
        x, y = 0.9 + shard.tp_rank * 2.75, 2.35 - shard.pp_rank * 2.0
        panel(axes, x, y, 2.3, 1.3, PALE[RANKS[shard.tp_rank]], COLOURS[RANKS[shard.tp_rank]])
        ends = f"{rows:,} rows of the embedding" if shard.is_first_stage else f"norm, {rows:,} rows of the LM head"
        lines = [
            f"layers {layers.start} to {layers.stop - 1}, a third of each",
            f"{mine.num_attention_heads} query heads, {mine.num_key_value_heads} KV head",
            ends,
        ]
        axes.text(x + 1.15, y + 1.1, f"rank {rank}", ha="center", va="center", size=10.5, weight="bold", color=INK)
        for number, line in enumerate(lines):
            axes.text(x + 1.15, y + 0.8 - 0.26 * number, line, ha="center", va="center", size=8.8, color=INK)
        if shard.is_first_stage:
            arrow(axes, (x + 1.15, y - 0.02), (x + 1.15, y - 0.68))
        if shard.tp_rank < 2:
            for ends_at in ((x + 2.32, x + 2.73), (x + 2.73, x + 2.32)):
                arrow(axes, (ends_at[0], y + 0.65), (ends_at[1], y + 0.65))
    for stage, y in ((0, 3.0), (1, 1.0)):
        axes.text(0.4, y, f"stage {stage}", ha="center", va="center", size=11, weight="bold", color=INK, rotation=90)
    note(axes, 2.15, 2.02, "hidden, residual", size=9)
    note(axes, 0.9, 3.95, "Between the ranks of a stage: all-reduces, two per layer.", size=9.5)
    save(axes, path)


# ---- the bubble

NUM_TOKENS = 6  # for each request
# Steps in flight, requests, and how long a turn is: below, twice the requests take twice the time.
TIMELINES = ((1, "abcd", 1), (2, "abcd", 1), (1, "abcdefgh", 2), (2, "abcdefgh", 1))


def steps_of(in_flight: int, names: str) -> list[list[str]]:
    """The requests of each step, as the real scheduler makes them for so many stages."""
    seen: list[list[str]] = []

    class Watched(FakePipeline):
        def execute(self, scheduler_output: SchedulerOutput) -> Any:
            seen.append(list(scheduler_output.num_scheduled_tokens))
            return super().execute(scheduler_output)

    core = make_core(Watched(in_flight), max_num_seqs=len(names), pipeline_parallel_size=in_flight)
    for name in names:
        core.add_request(make_request(name, prompt=4, max_tokens=NUM_TOKENS))
    while core.has_unfinished_requests():
        core.step()
    return [step for step in seen if step]


def starts_of(num_steps: int, in_flight: int) -> list[int]:
    """When each step enters stage 0 of two: when the stage is free, and the step `in_flight` before it has ended."""
    starts: list[int] = []
    for number in range(num_steps):
        free = starts[-1] + 1 if starts else 0
        starts.append(max(free, starts[number - in_flight] + 2 if number >= in_flight else 0))
    return starts


def bubble(path: Path) -> None:
    figure, axes = plt.subplots(len(TIMELINES), 1, figsize=(9, 6), sharex=True, layout="constrained")
    for ax, (in_flight, names, length) in zip(axes, TIMELINES, strict=True):
        steps = steps_of(in_flight, names)
        starts = [length * start for start in starts_of(len(steps), in_flight)]
        for step, start in zip(steps, starts, strict=True):
            key = RANKS[0] if names[0] in step else RANKS[1]
            for stage in range(2):
                left = start + length * stage
                ax.add_patch(Rectangle((left, stage - 0.4), length - 0.04, 0.8, fc=COLOURS[key]))
                ax.text(left + length / 2, stage, "".join(step), ha="center", va="center", size=9, color=ON[key])
        how = f"{'One step' if in_flight == 1 else 'Two steps'} in flight, {len(names)} requests"
        kind = "reading takes longest" if len(names) == len(TIMELINES[0][1]) else "arithmetic takes longest"
        title = f"{how}, {kind}: {len(names) * NUM_TOKENS} tokens after {starts[-1] + 2 * length} turns"
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_yticks([0, 1], ["stage 0", "stage 1"], fontsize=10)
        ax.set(xlim=(0, 24.2), ylim=(1.6, -0.6))
        ax.tick_params(axis="y", length=0)
    axes[-1].set_xlabel("turn: the time of one stage for a step of four requests")
    figure_files.save(figure, path)


FIGURES = {
    "09_cuts": two_cuts,
    "09_layer": layer,
    "09_ring": ring,
    "09_decode": decode,
    "09_ranks": six_ranks,
    "09_bubble": bubble,
}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
