"""Draw the pictures of docs/learn from what the real scheduler and KV cache do, with a model without weights.

Milestone: M2. vLLM counterpart: none. No torch, no GPU, a few seconds:

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


FIGURES = {"02_timeline": timeline}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
