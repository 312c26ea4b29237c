"""Draw the pictures of docs/learn/03 from what the real scheduler and KV cache do, without weights.

Milestone: M3. vLLM counterpart: none. No torch, no GPU, a few seconds:

    python scripts/dev/draw_paging_figures.py [--out docs/learn/img]

Every figure is a run of the engine core: the three requests of folovllm/learn/three_requests.py, or workload A on the
fake executor. The numbers that the page quotes from the figures are asserted here, so the page cannot go on quoting a
picture that has changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import figure_files
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from folovllm import viz
from folovllm.benchmarks.workloads import make_workload
from folovllm.config import EngineConfig
from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.learn.three_requests import EXAMPLES, Step, example_core, run_example
from folovllm.model_shapes import shape_architecture
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

COLOURS = viz.colours_of(EXAMPLES)
FREE, INK = viz.NOBODY, viz.INK
M2_COLOUR, M3_COLOUR = "#D55E00", "#0072B2"
BLOCK_SIZE = 4


# ---- one slot, one block


def pale(colour: str) -> tuple[float, ...]:
    """The colour of a slot that is reserved and holds nothing."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return tuple(0.22 * rgb + 0.78)


def draw_slot(
    ax: Axes, x: float, y: float, owner: str = "", position: int | None = None, text: str = "", bold: bool = True
) -> None:
    """A cell of width and height 1. Full colour holds K and V, pale is reserved, grey is free."""
    used = position is not None
    face = COLOURS[owner] if used else pale(COLOURS[owner]) if owner else FREE
    ax.add_patch(Rectangle((x, y), 1, 1, fc=face, ec="white", lw=1))
    ink = "white" if used and owner != "b" else INK
    if used:
        ax.text(x + 0.5, y + (0.32 if text else 0.52), f"{owner}{position}", ha="center", va="center", color=ink,
                weight="bold" if bold else "normal", fontsize=10 if bold else 9)  # fmt: skip
    if text:
        ax.text(x + 0.5, y + 0.74, text, ha="center", va="center", color=ink, fontsize=9)


def frame(ax: Axes, x: float, y: float, width: float, label: str, owner: str = "") -> None:
    """The border of a block, and its name above."""
    ax.add_patch(Rectangle((x, y), width, 1, fc="none", ec=INK if owner else "#999999", lw=1.5, zorder=3))
    ax.text(x + width / 2, y - 0.08, label, ha="center", va="bottom", fontsize=9, color=INK)


def piece(owner: str, position: int) -> str:
    """The text of a request's token, with \u2423 for a space, as on page 00."""
    example = EXAMPLES[owner]
    return (example.pieces + example.answer_pieces)[position].replace(" ", "\u2423").replace("\n", "\\n")


def lengths_after(step: Step) -> dict[str, int]:
    """Tokens of each scheduled request whose K and V are in the cache when the step has run."""
    return {name: step.start[name] + count for name, count in step.scheduled.items()}


def owners_of(step: Step) -> dict[int, tuple[str, int]]:
    """Block id -> (request, number of the block in the request's table)."""
    return {block: (name, i) for name, table in step.blocks.items() for i, block in enumerate(table)}


# ---- 03: the three requests


def block_map(path: Path) -> None:
    """Step 2 of the three requests in 36 slots: a block of 16 for each request, and blocks of 4."""
    m2 = list(run_example(example_core(block_size=16, max_num_seqs=2)))[2]
    m3 = list(run_example(example_core(num_kv_blocks=10)))[2]
    assert (m2.waiting, m3.waiting) == (["c"], [])
    assert (sum(lengths_after(m2).values()), sum(lengths_after(m3).values())) == (13, 25)
    figure, axes = plt.subplots(2, 1, figsize=(9, 6.4), layout="constrained")
    _slot_panel(axes[0], m2, block_size=16)
    _slot_panel(axes[1], m3, block_size=4)
    axes[0].set_title("M2, one block of 16 slots for each request: c waits, and 13 of the 36 slots hold a token",
                      loc="left", fontsize=11)  # fmt: skip
    axes[1].set_title("M3, blocks of 4 slots: a, b and c run, and 25 of the 36 slots hold a token", loc="left",
                      fontsize=11)  # fmt: skip
    axes[0].text(4.2, 2 * 1.55 + 0.5, "4 slots are left over: too few for a third block of 16", va="center", fontsize=9)
    figure_files.save(figure, path)


def _slot_panel(ax: Axes, step: Step, block_size: int, num_slots: int = 36, columns: int = 16) -> None:
    """The usable slots in rows of 16. The null block is left out."""
    owners, lengths = owners_of(step), lengths_after(step)
    for slot in range(num_slots):
        block, offset = slot // block_size + 1, slot % block_size
        name, i = owners.get(block, ("", 0))
        position = i * block_size + offset
        x, y = slot % columns, slot // columns * 1.55
        if name and position < lengths[name]:
            draw_slot(ax, x, y, name, position, piece(name, position))
        else:
            draw_slot(ax, x, y, name)
        if offset == 0 and slot + block_size <= num_slots:
            owner = f": entry {i} of {name}" if block_size < 16 else f": {name}"
            label = f"block {block}" + (owner if name else ", free")
            frame(ax, x, y, block_size, label, name)
    ax.set(xlim=(-0.05, columns + 0.05), ylim=(2 * 1.55 + 1.1, -0.5))
    ax.axis("off")


def slots(path: Path) -> None:
    """From a position of request c to its slot, in the pool of 6 usable blocks."""
    step = list(run_example(example_core(num_kv_blocks=7)))[4]
    owners, lengths, table, position = owners_of(step), lengths_after(step), step.blocks["c"], 9
    slot = table[position // 4] * 4 + position % 4
    assert (table, slot) == ([2, 1, 5], 21)
    figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    left = {block: 4.6 * block for block in range(7)}  # where each physical block begins
    for i, block in enumerate(table):
        x = 9.2 + 6 * i
        for p in range(4 * i, 4 * i + 4):
            draw_slot(ax, x + p % 4, 0.5, "c", p, bold=False)
        frame(ax, x, 0.5, 4, f"entry {i}", "c")
        ax.add_patch(FancyBboxPatch((x + 1.1, 2.75), 1.8, 0.7, boxstyle="round,pad=0.1", fc="white", ec=INK))
        ax.text(x + 2, 3.1, f"{block}", ha="center", va="center", fontsize=12, weight="bold")
        _arrow(ax, (x + 2, 1.55), (x + 2, 2.6))
        _arrow(ax, (x + 2, 3.6), (left[block] + 2, 5.25))
        if i == position // 4:
            _highlight(ax, x + position % 4, 0.5)
    for block in range(7):
        name, i = owners.get(block, ("", 0))
        for offset in range(4):
            p = 4 * i + offset
            draw_slot(ax, left[block] + offset, 6, name, p if name and p < lengths[name] else None, bold=False)
            ax.text(left[block] + offset + 0.5, 7.3, str(4 * block + offset), ha="center", va="center", fontsize=9)
        label = "block 0 (null)" if block == 0 else f"block {block}" + (", free" if not name else "")
        frame(ax, left[block], 6, 4, label, name)
    _highlight(ax, left[slot // 4] + slot % 4, 6)
    for y, text in (
        (1, "step 4: the tokens\nof c, in their order"),
        (3.1, "block table of c"),
        (4.85, "the cache: blocks,\nslots numbered below"),
    ):
        ax.text(0, y, text, va="center", fontsize=10)
    ax.text(left[5] + 1.5, 8.15, "position 9 is in slot 21", ha="center", va="center", fontsize=10, weight="bold")
    ax.set(xlim=(-0.2, 31.8), ylim=(8.5, -0.3))
    ax.axis("off")
    figure_files.save(figure, path)


def _highlight(ax: Axes, x: float, y: float) -> None:
    ax.add_patch(Rectangle((x, y), 1, 1, fc="none", ec="black", lw=3.5, zorder=4))


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-|>") -> None:
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=11, color=INK, lw=1, shrinkA=0, shrinkB=0)
    )


def preemption(path: Path) -> None:
    """Steps 3 to 6 of the three requests in 6 usable blocks."""
    steps = list(run_example(example_core(num_kv_blocks=7)))
    assert steps[3].waiting == ["c"] and steps[4].blocks["c"] == [2, 1, 5]
    assert steps[5].preempted == ["c"] and steps[6].blocks == {"c": [6, 4, 3, 5]}
    core = example_core(num_kv_blocks=7)
    queue = core.scheduler.kv_cache_manager.block_pool.free_block_queue
    free = {step.number: [block.block_id for block in queue.get_all_free_blocks()] for step in run_example(core)}
    assert (free[2], free[3], free[5]) == ([5, 6], [2, 1, 5, 6], [6, 4, 3, 5, 1, 2])
    said = {
        3: "c waits: it needs 3 blocks, and 2 are free. a finishes at its end.",
        4: "c takes the first three blocks of the free queue: 2, 1, 5.",
        5: "b takes block 6. c finds none: preempted. b finishes at its end.",
        6: "c takes 6, 4, 3, 5, and computes its 13 tokens.",
    }
    figure, axes = plt.subplots(4, 1, figsize=(9, 5.8), layout="constrained")
    for ax, (number, text) in zip(axes, said.items(), strict=True):
        step = steps[number]
        owners, lengths = owners_of(step), lengths_after(step)
        for block in range(1, 7):
            name, i = owners.get(block, ("", 0))
            x = (block - 1) * 4.25
            for offset in range(4):
                p = 4 * i + offset
                draw_slot(ax, x + offset, 0, name, p if name and p < lengths[name] else None)
            frame(ax, x, 0, 4, f"block {block}" + ("" if name else ", free"), name)
        ax.set_title(f"Step {number}. {text}", loc="left", fontsize=10.5)
        if number < 6:
            then = " ".join(map(str, free[number]))
            ax.set_title(f"free queue after it: {then}", loc="right", fontsize=10, color="#57606a")
        ax.set(xlim=(-0.05, 25.35), ylim=(1.05, -0.45))
        ax.axis("off")
    figure_files.save(figure, path)


class Watched(BlockPool):
    """A pool that notes the free queue, from head to tail, after every call that changed it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[str, list[int], list[int]]] = []

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        blocks = super().get_new_blocks(num_blocks)
        if blocks:
            self._note("take", blocks)
        return blocks

    def free_blocks(self, ordered_blocks: Sequence[KVCacheBlock]) -> None:
        super().free_blocks(ordered_blocks)
        if ordered_blocks:
            self._note("free", ordered_blocks)

    def _note(self, what: str, blocks: Sequence[KVCacheBlock]) -> None:
        queue = [block.block_id for block in self.free_block_queue.get_all_free_blocks()]
        self.seen.append((what, [block.block_id for block in blocks], queue))


def free_queue(path: Path) -> None:
    """The free queue of the run in 9 usable blocks, from the step in which c is admitted to the end of step 3."""
    core = example_core(num_kv_blocks=10, parts={"core.block_pool": f"{__file__}:Watched"})
    list(run_example(core))
    pool = core.scheduler.kv_cache_manager.block_pool
    seen = pool.seen[3:]
    assert [(what, blocks) for what, blocks, _ in seen] == [
        ("take", [5, 6, 7]), ("take", [8]), ("free", [2, 1]), ("free", [8, 7, 6, 5]), ("take", [8]),
        ("free", [8, 4, 3]),
    ]  # fmt: skip
    said = (
        "Step 2: c takes 5, 6 and 7 from the head.",
        "Step 3: c takes 8.",
        "Step 3 ends: a is done, and frees 2, then 1.",
        "Still step 3: c is done, and frees 8, 7, 6, 5.",
        "Step 5: b takes 8 from the head.",
    )
    figure, ax = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for row, (text, (what, blocks, queue)) in enumerate(zip(said, seen, strict=False)):
        _queue_row(ax, row, text, queue, new=blocks if what == "free" else [])
    pool = BlockPool(num_blocks=10)
    pool.free_block_queue.popleft_n(9)
    before = seen[4][2]
    pool.free_block_queue.append_n(pool.blocks[block] for block in before)
    pool.free_block_queue.remove(pool.blocks[5])
    assert [block.block_id for block in pool.free_block_queue.get_all_free_blocks()] == [7, 6, 2, 1, 9]
    text = "A removal from the middle, as M6 needs it:\nwithout 5, 6 and 2 are linked."
    _queue_row(ax, len(said), text, before, gone=5)
    ax.text(0, len(said) + 0.75, "Yellow: blocks that this line has freed.", va="center", fontsize=9)
    ax.set(xlim=(0, 20.4), ylim=(len(said) + 1, -0.5))
    ax.axis("off")
    figure_files.save(figure, path)


def _queue_row(
    ax: Axes, row: int, text: str, queue: Sequence[int], new: Sequence[int] = (), gone: int | None = None
) -> None:
    """What happened, then head, blocks and tail, linked in both directions. The link leads around the block `gone`."""
    ax.text(0, row, text, va="center", fontsize=10)
    centre = dict(zip(["head", *queue, "tail"], np.arange(len(queue) + 2) * 1.32 + 8.6, strict=True))
    for place, x in centre.items():
        if isinstance(place, str):
            ax.text(x, row, place, ha="center", va="center", fontsize=9)
            continue
        face = "white" if place == gone else "#FFF3B0" if place in new else FREE
        box = FancyBboxPatch((x - 0.3, row - 0.22), 0.6, 0.44, boxstyle="round,pad=0.06", fc=face, ec=INK)
        box.set_linestyle("--" if place == gone else "-")
        ax.add_patch(box)
        ax.text(x, row, str(place), ha="center", va="center", fontsize=11, weight="bold")
    linked = [x for place, x in centre.items() if place != gone]
    for before, after in pairwise(linked):
        if after - before < 2:
            _arrow(ax, (before + 0.42, row), (after - 0.42, row), "<|-|>")
        else:
            arc = FancyArrowPatch((before, row - 0.3), (after, row - 0.3), connectionstyle="arc3,rad=-0.3",
                                  arrowstyle="<|-|>", mutation_scale=11, color=INK)  # fmt: skip
            ax.add_patch(arc)


# ---- 03: workload A


@dataclass
class Run:
    """What happened, step by step."""

    running: list[int] = field(default_factory=list)
    used_slots: list[int] = field(default_factory=list)
    reserved_slots: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0

    @property
    def mean_utilisation(self) -> float:
        return float(np.mean(np.array(self.used_slots) / np.array(self.reserved_slots)))


def make_core(lengths: list[tuple[int, int]], **engine_args: Any) -> EngineCore:
    """An engine for SmolLM2-135M with one request waiting for each (prompt, output) length."""
    config = EngineConfig.from_args(max_model_len=2048, **engine_args)
    core = EngineCore(config.resolve(shape_architecture("smollm2-135m"), "cpu"), FakeExecutor())
    for i, (num_prompt_tokens, num_output_tokens) in enumerate(lengths):
        prompt = [(31 * i + 7 * j) % 1000 for j in range(num_prompt_tokens)]
        core.add_request(Request(f"r{i}", prompt, SamplingParams(max_tokens=num_output_tokens, ignore_eos=True)))
    return core


def drive(core: EngineCore) -> Run:
    """Runs all requests. The slots are counted while a step runs, before any request finishes."""
    run = Run()
    while core.has_unfinished_requests():
        scheduled = core.scheduler.schedule()
        stats = core.stats()
        run.running.append(stats.num_running)
        run.used_slots.append(stats.num_used_slots)
        run.reserved_slots.append(stats.num_reserved_slots)
        run.num_computed_tokens += scheduled.total_num_scheduled_tokens
        core.scheduler.update_from_output(scheduled, core.executor.sample(core.executor.execute(scheduled)))
        core.scheduler.check_integrity()
    return run


def kv_utilisation(path: Path) -> None:
    """Workload A in the same memory, 8 times 2,048 slots: one block of 2,048 for each request, and blocks of 16."""
    lengths = [(len(r.prompt_token_ids), r.output_len) for r in make_workload("A", 49152).requests]
    held = np.mean([prompt + output - 1 for prompt, output in lengths])  # the page quotes both
    assert (round(float(held), 1), round(float(held) / 2048, 3)) == (225.7, 0.110)
    m2 = drive(make_core(lengths, preset="m2", num_kv_blocks=8 + 1))
    m3 = drive(make_core(lengths, preset="m3", num_kv_blocks=8 * 128 + 1))
    assert (len(m2.running), len(m3.running), max(m2.running), max(m3.running)) == (312, 128, 8, 32)
    assert (round(m2.mean_utilisation, 3), round(m3.mean_utilisation, 3)) == (0.094, 0.965)
    _check_a_quarter_of_it(lengths)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
    for run, colour in ((m2, M2_COLOUR), (m3, M3_COLOUR)):
        left.plot(100 * np.array(run.used_slots) / np.array(run.reserved_slots), color=colour, lw=1.8)
        right.plot(run.running, color=colour, lw=1.8)
    for ax, run, text, place in _labels(left, right, m2, m3):
        ax.text(*place, text, color=M2_COLOUR if run is m2 else M3_COLOUR, fontsize=10, va="bottom")
    left.set_title("Used share of the reserved slots, %", fontsize=11, loc="left")
    right.set_title("Requests in the batch", fontsize=11, loc="left")
    left.set(xlabel="step", ylim=(0, 112), yticks=range(0, 101, 20))
    right.set(xlabel="step", ylim=(0, 36))
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure_files.save(figure, path)


def _labels(left: Axes, right: Axes, m2: Run, m3: Run) -> Iterator[tuple[Axes, Run, str, tuple[float, float]]]:
    yield left, m2, f"M2: one block of 2,048\nmean {m2.mean_utilisation:.1%}", (90, 15)
    yield left, m3, f"M3: blocks of 16, mean {m3.mean_utilisation:.1%}", (2, 101)
    yield right, m2, f"M2: at most {max(m2.running)},\ndone after {len(m2.running)} steps", (140, 9)
    yield right, m3, f"M3: at most {max(m3.running)},\ndone after {len(m3.running)} steps", (70, 24)


def _check_a_quarter_of_it(lengths: list[tuple[int, int]]) -> None:
    """The other rows of the page's table: 2 blocks of 2,048, or 256 of 16. Not drawn."""
    m2 = drive(make_core(lengths, preset="m2", num_kv_blocks=2 + 1))
    core = make_core(lengths, preset="m3", num_kv_blocks=2 * 128 + 1)
    m3 = drive(core)
    assert (len(m2.running), len(m3.running), max(m2.running), max(m3.running)) == (1158, 172, 2, 23)
    assert (round(m2.mean_utilisation, 3), round(m3.mean_utilisation, 3)) == (0.095, 0.964)
    assert (core.stats().num_preemptions, m3.num_computed_tokens) == (6, 8151)


FIGURES: Mapping[str, Any] = {
    "03_kv_utilisation": kv_utilisation,
    "03_block_map": block_map,
    "03_slots": slots,
    "03_preemption": preemption,
    "03_free_queue": free_queue,
}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
