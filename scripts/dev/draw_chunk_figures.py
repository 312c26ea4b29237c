"""Draw the pictures of docs/learn/05: a long prompt among decodes, whole and in chunks, and what each budget costs.

Milestone: M5. vLLM counterpart: none. No torch, no weights, a few seconds:

    python scripts/dev/draw_chunk_figures.py [--out docs/learn/img]

Which step computes what is a run of the real scheduler on the fake executor. How long a step takes is *modelled*: the
larger of reading its bytes and computing its operations, with two figures of one machine. The
figures that the page quotes are asserted here. Measured ones come from scripts/tune_chunk_size.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figure_files
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.hf_config import parse_hf_config
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json"
PROMPT, COMPUTES, DECODE, INK, LINE = "#d95f02", "#d5ece4", "#1b7a5a", "#333333", "#1f77b4"

# A machine of two cores, and SmolLM2-135M in bf16.
BYTES_PER_SECOND, OPERATIONS_PER_SECOND = 39e9, 0.85e12
LAYERS, WIDTH = 30, 576  # 9 query heads of 64
BODY, WEIGHT_BYTES, KV_BYTES = 106_202_880, 2 * 134_515_008, 23_040  # parameters, bytes, bytes per token

NUM_DECODES, DECODE_TOKENS, LONG_PROMPT = 8, 300, 4000
WARM_UP = 3  # steps before the long prompt arrives


def step_ms(work: Sequence[tuple[int, int]]) -> float:
    """Modelled time of a step that computes, for each (computed, new), `new` tokens after `computed` others."""
    linear = 2 * BODY * sum(new for _, new in work)
    attention = 4 * WIDTH * LAYERS * sum(new * (computed + (new + 1) / 2) for computed, new in work)
    read = WEIGHT_BYTES + KV_BYTES * sum(computed + new for computed, new in work)
    return 1000 * max((linear + attention) / OPERATIONS_PER_SECOND, read / BYTES_PER_SECOND)


@dataclass(frozen=True)
class Run:
    """Steps as {request: (computed before, new)}, their modelled times, and when the long prompt arrived."""

    steps: list[dict[str, tuple[int, int]]]
    times: list[float]  # ms
    arrival: int

    @property
    def last_chunk(self) -> int:
        return max(i for i, step in enumerate(self.steps) if "long" in step)

    @property
    def num_chunks(self) -> int:
        return sum("long" in step for step in self.steps)

    @property
    def ttft(self) -> float:
        return sum(self.times[self.arrival : self.last_chunk + 1])

    @property
    def worst_itl(self) -> float:
        """A decode gets a token from every step, so its gaps are the steps' times."""
        return max(self.times[self.arrival :])

    @property
    def total(self) -> float:
        return sum(self.times)


def run(budget: int | None, num_decodes: int = NUM_DECODES, tokens: int = DECODE_TOKENS) -> Run:
    """Decodes run, then a long prompt arrives; `budget` None: chunked prefill off."""
    chunks: dict[str, Any] = {"enable_chunked_prefill": budget is not None, "max_num_batched_tokens": budget}
    config = EngineConfig.from_args(preset="m4", attention_backend="torch_naive", max_num_seqs=64, **chunks)
    core = EngineCore(config.resolve(parse_hf_config(json.loads(SMOLLM2.read_text())), "cpu"), FakeExecutor())
    for i in range(num_decodes):
        core.add_request(make_request(f"d{i}", 16, tokens))
    steps: list[dict[str, tuple[int, int]]] = []
    arrival = None
    while core.has_unfinished_requests():
        if arrival is None and sum(len(step) == num_decodes for step in steps) >= WARM_UP:
            arrival = len(steps)
            core.add_request(make_request("long", LONG_PROMPT, 1))
        steps.append(one_step(core))
    assert arrival is not None
    return Run(steps, [step_ms(list(step.values())) for step in steps], arrival)


def make_request(name: str, prompt: int, tokens: int) -> Request:
    return Request(name, [(7 * i) % 1000 for i in range(prompt)], SamplingParams(max_tokens=tokens, ignore_eos=True))


def one_step(core: EngineCore) -> dict[str, tuple[int, int]]:
    output = core.scheduler.schedule()
    requests = core.scheduler.requests  # schedule() has added the new tokens to num_computed_tokens already
    counts = output.num_scheduled_tokens
    step = {name: (requests[name].num_computed_tokens - new, new) for name, new in counts.items()}
    core.scheduler.update_from_output(output, core.executor.sample(core.executor.execute(output)))
    return step


# ---- the Gantt chart


def stall(path: Path) -> None:
    """Four decodes and a long prompt on a common clock."""
    whole, chunked = run(None, num_decodes=4), run(256, num_decodes=4)
    figure, axes = plt.subplots(2, 1, figsize=(10, 4.6), sharex=True, layout="constrained")
    for ax, name, one in ((axes[0], "the whole prompt in one step (m4)", whole), (axes[1], "budget 256 (m5)", chunked)):
        _gantt(ax, one, 4)
        worst, ttft = one.worst_itl, one.ttft
        ax.set_title(f"{name}: worst gap between tokens {worst:,.0f} ms, the prompt's first token after {ttft:,.0f} ms",
                     loc="left", fontsize=10)  # fmt: skip
    axes[1].set_xlabel("ms after the long prompt arrived (modelled); a dark line is a token of a decode")
    axes[0].set_xlim(-60, 1.25 * chunked.ttft)
    figure_files.save(figure, path)


def _gantt(ax: Axes, one: Run, num_decodes: int) -> None:
    clock = -sum(one.times[: one.arrival])
    rows = {f"d{i}": i for i in range(num_decodes)} | {"long": num_decodes}
    for step, ms in zip(one.steps, one.times, strict=True):
        for name, (_, new) in step.items():
            is_prompt = name == "long" or new > 1
            colour = PROMPT if is_prompt else COMPUTES
            ax.add_patch(Rectangle((clock, rows[name] - 0.4), ms, 0.8, fc=colour, ec="white", lw=0.4))
            if name == "long":
                ax.text(clock + ms / 2, rows[name], str(new), ha="center", va="center", fontsize=6, color="white")
            if not is_prompt:
                ax.plot([clock + ms] * 2, [rows[name] - 0.4, rows[name] + 0.4], color=DECODE, lw=1.6)
        clock += ms
    ax.axvline(0, color=INK, lw=0.8, ls=":")
    ax.set_yticks(list(rows.values()), [*(f"decode {i + 1}" for i in range(num_decodes)), "long prompt"])
    ax.set_ylim(num_decodes + 0.6, -0.6)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


# ---- what a budget costs

BUDGETS = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
# What the page quotes: budget -> chunks of the prompt; worst ITL, TTFT of the long prompt, time of everything, in ms.
QUOTED = {
    None: (1, 1652, 1652, 3974),
    2048: (2, 973, 1654, 3970),
    1024: (4, 513, 1658, 3960),
    256: (17, 142, 1685, 3894),
    64: (72, 34, 1797, 3618),
    32: (167, 16, 1995, 3098),
    16: (397, 10, 3372, 3448),
}


def budget(path: Path) -> None:
    """Worst ITL, TTFT and total time against the budget."""
    whole, runs = run(None), {tokens: run(tokens) for tokens in BUDGETS}
    for tokens, numbers in QUOTED.items():
        one = whole if tokens is None else runs[tokens]
        rounded = (one.num_chunks, round(one.worst_itl), round(one.ttft), round(one.total))
        assert rounded == numbers, f"the page says {numbers} for a budget of {tokens}; it is {rounded}"
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    panels = [
        ("worst gap between tokens of a decode, ms", "worst_itl"),
        ("first token of the long prompt, ms", "ttft"),
        ("everything done, ms", "total"),
    ]
    for ax, (title, name) in zip(axes, panels, strict=True):
        ax.plot(BUDGETS, [getattr(one, name) for one in runs.values()], "o-", color=LINE, label="budget")
        ax.axhline(getattr(whole, name), color=PROMPT, ls="--", lw=1, label="off")
        ax.set_xscale("log", base=2)
        ax.set_xticks(BUDGETS, [str(b) for b in BUDGETS], fontsize=7, rotation=45)
        ax.set(title=title, ylim=(0, None))
        ax.title.set_fontsize(9)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="center left")
    figure.supxlabel("max_num_batched_tokens", fontsize=9)
    figure_files.save(figure, path)


FIGURES = {"05_stall": stall, "05_budget": budget}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
