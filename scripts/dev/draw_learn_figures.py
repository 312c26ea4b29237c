"""Draw the pictures of docs/learn from what the real scheduler and KV cache do, with a model without weights.

Milestones: M2, M3. vLLM counterpart: none. No torch, no GPU, a few seconds:

    python scripts/dev/draw_learn_figures.py [--out docs/learn/img]

Every figure is a run of the engine core on the fake executor; nothing in it is typed by hand. The numbers that the
pages quote from the figures are asserted here, so a page cannot go on quoting a picture that has changed.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import figure_files
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from folovllm.benchmarks.workloads import make_workload
from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.hf_config import parse_hf_config
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json"
WAITS, PREFILL, DECODE = "#eeeeee", "#d95f02", "#1b9e77"
M2_COLOUR, M3_COLOUR = "#1f77b4", "#d62728"


@dataclass
class Run:
    """What happened, step by step."""

    computed: list[dict[str, int]] = field(default_factory=list)  # request -> tokens
    running: list[int] = field(default_factory=list)
    used_slots: list[int] = field(default_factory=list)
    reserved_slots: list[int] = field(default_factory=list)

    @property
    def mean_utilisation(self) -> float:
        return float(np.mean(np.array(self.used_slots) / np.array(self.reserved_slots)))


def make_core(lengths: list[tuple[int, int]], **engine_args: Any) -> EngineCore:
    """An engine with one request waiting for each (prompt, output) length."""
    arch = parse_hf_config(json.loads(SMOLLM2.read_text()))
    core = EngineCore(EngineConfig.from_args(**engine_args).resolve(arch, "cpu"), FakeExecutor())
    for i, (num_prompt_tokens, num_output_tokens) in enumerate(lengths):
        prompt = [(31 * i + 7 * j) % 1000 for j in range(num_prompt_tokens)]
        core.add_request(Request(f"r{i}", prompt, SamplingParams(max_tokens=num_output_tokens, ignore_eos=True)))
    return core


def step(core: EngineCore, run: Run) -> None:
    """One step; the slots are counted while it runs, before any request finishes."""
    scheduled = core.scheduler.schedule()
    stats = core.stats()
    run.computed.append(scheduled.num_scheduled_tokens)
    run.running.append(stats.num_running)
    run.used_slots.append(stats.num_used_slots)
    run.reserved_slots.append(stats.num_reserved_slots)
    core.scheduler.update_from_output(scheduled, core.executor.sample(core.executor.execute(scheduled)))
    core.scheduler.check_integrity()


def drive(core: EngineCore) -> Run:
    run = Run()
    while core.has_unfinished_requests():
        step(core, run)
    return run


# ---- 02: who computes when


def timeline(path: Path) -> None:
    """Ten requests and four seats: one at a time, static, continuous."""
    rng = random.Random(2)
    lengths = [(rng.randint(3, 9), rng.randint(2, 20)) for _ in range(10)]
    common: dict[str, Any] = {"preset": "m2", "max_model_len": 64, "num_kv_blocks": 20}
    runs = {
        "one at a time": drive(make_core(lengths, **common, max_num_seqs=1)),
        "static, 4 seats": drive(make_core(lengths, **common, without=["m2"], max_num_seqs=4)),
        "continuous, 4 seats": drive(make_core(lengths, **common, max_num_seqs=4)),
    }
    assert [len(run.computed) for run in runs.values()] == [94, 44, 30]
    figure, axes = plt.subplots(3, 1, figsize=(9, 7.2), sharex=True, layout="constrained")
    for ax, (name, run) in zip(axes, runs.items(), strict=True):
        _timeline_panel(ax, name, run, len(lengths))
    axes[-1].set(xlabel="step", xlim=(0.5, 94.5))
    figure.suptitle("Ten requests: orange computes its prompt, green makes a token, grey waits", fontsize=11)
    figure_files.save(figure, path)


def _timeline_panel(ax: Axes, name: str, run: Run, num_requests: int) -> None:
    cells = np.full((num_requests, len(run.computed)), np.nan)
    for i in range(num_requests):
        mine = [s for s, computed in enumerate(run.computed) if f"r{i}" in computed]
        cells[i, : mine[0]] = 0
        cells[i, mine[0]] = 1
        cells[i, mine[1:]] = 2
    ax.imshow(cells, aspect="auto", cmap=ListedColormap([WAITS, PREFILL, DECODE]), vmin=0, vmax=2,
              extent=(0.5, len(run.computed) + 0.5, num_requests - 0.5, -0.5), interpolation="none")  # fmt: skip
    seats = max(run.running)
    busy = sum(run.running) / (seats * len(run.running))
    ax.set_title(f"{name}: {len(run.computed)} steps, seats busy {busy:.0%}", fontsize=10, loc="left")
    ax.set_ylabel("request")
    ax.set_yticks(range(num_requests))


# ---- 03: what the cache holds


def kv_utilisation(path: Path) -> None:
    """Workload A in the same usable bytes, 8 pages of 2,048 tokens: a page per request against blocks of 16."""
    lengths = [(len(r.prompt_token_ids), r.output_len) for r in make_workload("A", 49152).requests]
    m2 = drive(make_core(lengths, preset="m2", max_model_len=2048, num_kv_blocks=8 + 1))
    m3 = drive(make_core(lengths, preset="m3", max_model_len=2048, num_kv_blocks=8 * 128 + 1))
    assert (len(m2.computed), len(m3.computed), max(m2.running), max(m3.running)) == (312, 128, 8, 32)
    assert (round(m2.mean_utilisation, 3), round(m3.mean_utilisation, 3)) == (0.094, 0.965)
    _check_a_quarter_of_it(lengths)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for run, name, colour in ((m2, "m2: one page each", M2_COLOUR), (m3, "m3: blocks of 16", M3_COLOUR)):
        steps = range(1, len(run.computed) + 1)
        share = 100 * np.array(run.used_slots) / np.array(run.reserved_slots)
        left.plot(steps, share, color=colour, label=f"{name}, mean {run.mean_utilisation:.1%}")
        right.plot(steps, run.running, color=colour, label=f"{name}, done after {len(run.computed)} steps")
    left.set(title="KV cache: used slots / reserved slots, %", xlabel="step", ylim=(0, 103))
    right.set(title="requests that run", xlabel="step", ylim=(0, 34))
    for ax in (left, right):
        ax.legend(fontsize=8, loc="center right")
        ax.grid(alpha=0.3)
    figure.suptitle("Workload A, 360 MiB of KV cache (SmolLM2-135M, bf16), counted on the fake executor", fontsize=11)
    figure_files.save(figure, path)


def _check_a_quarter_of_it(lengths: list[tuple[int, int]]) -> None:
    """The table's other rows: 2 pages, or 256 blocks. Not drawn."""
    m2 = drive(make_core(lengths, preset="m2", max_model_len=2048, num_kv_blocks=2 + 1))
    core = make_core(lengths, preset="m3", max_model_len=2048, num_kv_blocks=2 * 128 + 1)
    m3 = drive(core)
    assert (len(m2.computed), len(m3.computed), max(m2.running), max(m3.running)) == (1158, 172, 2, 23)
    assert (round(m2.mean_utilisation, 3), round(m3.mean_utilisation, 3)) == (0.095, 0.964)
    assert core.stats().num_preemptions == 6 and sum(sum(c.values()) for c in m3.computed) == 8151


def block_map(path: Path) -> None:
    """Every slot of a small cache at one moment, and its owner: 6 pages of 64 tokens against 96 blocks of 4."""
    rng = random.Random(3)
    lengths = [(rng.randint(4, 30), rng.randint(3, 25)) for _ in range(24)]
    figure, axes = plt.subplots(2, 1, figsize=(10, 5), layout="constrained")
    for ax, name, block_size, num_blocks in (
        (axes[0], "m2, one page of 64 per request", 64, 6),
        (axes[1], "m3, blocks of 4", 4, 96),
    ):
        preset = "m2" if block_size == 64 else "m3"
        args = {} if preset == "m2" else {"block_size": block_size}
        core = make_core(lengths, preset=preset, max_model_len=64, num_kv_blocks=num_blocks + 1, **args)
        run = Run()
        for _ in range(12):
            step(core, run)
        _slot_panel(ax, core, block_size, num_blocks, name)
    figure.suptitle("384 slots after 12 steps: dark holds a token, pale is reserved in vain, grey is free", fontsize=11)
    figure_files.save(figure, path)


def _slot_panel(ax: Axes, core: EngineCore, block_size: int, num_blocks: int, name: str) -> None:
    """Rows of 64 slots. The null block is left out."""
    image = np.full((num_blocks * block_size, 3), 0.93)
    colours = np.concatenate([plt.get_cmap("tab10")(range(10)), plt.get_cmap("Dark2")(range(8))])[:, :3]
    running = core.scheduler.running
    assert len(running) <= len(colours)
    for request, colour in zip(running, colours, strict=False):
        (table,) = core.scheduler.kv_cache_manager.get_block_ids(request.request_id)
        slots = np.concatenate([np.arange(block_size) + (block - 1) * block_size for block in table])
        image[slots] = 0.25 * colour + 0.75
        image[slots[: request.num_computed_tokens]] = colour
    ax.imshow(image.reshape(-1, 64, 3), aspect="auto", extent=(0, 64, num_blocks * block_size / 64, 0))
    ax.set_xticks(range(0, 65, block_size), labels=[])
    ax.set_yticks(range(num_blocks * block_size // 64 + 1), labels=[])
    ax.grid(color="white", linewidth=1.2)
    ax.tick_params(length=0)
    stats = core.stats()
    used = stats.num_used_slots / (num_blocks * block_size)
    ax.set_title(f"{name}: {len(running)} requests run, {used:.0%} of the memory holds tokens", fontsize=10, loc="left")


FIGURES = {"02_timeline": timeline, "03_kv_utilisation": kv_utilisation, "03_block_map": block_map}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
