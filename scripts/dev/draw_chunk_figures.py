"""Draw the pictures of docs/learn/05: the stall, the three requests under a budget, a chunk's attention, the cost.

Milestone: M5. vLLM counterpart: none. No torch, no weights, a few seconds:

    python scripts/dev/draw_chunk_figures.py [--out docs/learn/img]

Nothing is typed in by hand. The three requests are runs of the real scheduler. Measured times come from the result
files of milestones/m5. Modelled times come from folovllm/learn/prefill_costs.py, as those that the page prints.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import figure_files
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from folovllm.learn.prefill_costs import calibrated, modelled
from folovllm.learn.three_requests import EXAMPLES, Step, example_core, run_example
from folovllm.viz import PALETTE

ROOT = figure_files.ROOT
RESULTS = ROOT / "milestones/m5/results"
COLOURS: dict[str, str] = dict(zip("abc", PALETTE, strict=False))
INK, READER, LONG = "#333333", PALETTE[0], PALETTE[2]
MODELLED, SLOWER, MEASURED = PALETTE[5], PALETTE[3], PALETTE[0]
BUDGET = 6
NUM_READERS, LONG_PROMPT = 8, 4_000
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})


def result(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return loaded


# ---- the stall, as measured

Token = tuple[float, float]  # ms after the long prompt arrived, ms since the token before


def readers_tokens(arm: str) -> list[Token]:
    """The tokens of a decoding request around the arrival of the first long prompt, in `arm` of long_prompts_cpu.json.

    All eight decoding requests get a token from every step, so one of them stands for all. A gap of more than 100 ms
    is a step with a part of a long prompt; the first such gap begins when the first long prompt arrived.
    """
    groups = result("long_prompts_cpu.json")["arms"][arm]["modes"]["batch"]["groups"]
    gaps: list[list[float]] = groups["decoding"]["gaps"]
    first = next(i for i, (_, gap) in enumerate(gaps) if i > 0 and gap > 100)
    arrival = gaps[first - 1][0]
    return [(1000 * (seconds - arrival), gap) for seconds, gap in gaps]


def chunks_of(tokens: Sequence[Token]) -> list[tuple[float, float]]:
    """(start, ms) of the steps that compute the long prompt: those from its arrival up to the first short gap."""
    steps = []
    for when, gap in tokens:
        if when > 0:
            if gap < 30:
                break
            steps.append((when - gap, gap))
    return steps


def stall(path: Path) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(9, 5.2), sharex=True, layout="constrained")
    for ax, arm, name in zip(axes, ("m4", "m5+budget=256"), ("whole prompt (m4)", "budget 256 (m5)"), strict=True):
        tokens = readers_tokens(arm)
        chunks = chunks_of(tokens)
        _draw_stall(ax, tokens, chunks)
        worst = max(gap for when, gap in tokens if 0 < when < 4600)
        plural = "one step" if len(chunks) == 1 else f"{len(chunks)} steps"
        ax.set_title(f"{name}: the prompt takes {plural}, the longest gap is {worst:,.0f} ms", loc="left", fontsize=11)
    axes[1].set_xlabel("ms after the first long prompt arrived (measured; a thin line is a token of that reader)")
    axes[0].set_xlim(-150, 4400)
    figure_files.save(figure, path)


def _draw_stall(ax: Axes, tokens: Sequence[Token], chunks: Sequence[tuple[float, float]]) -> None:
    for row in range(NUM_READERS):
        ax.add_patch(Rectangle((-200, row - 0.42), 5000, 0.84, fc="#EEF3F8", ec="none"))
        ax.vlines([when for when, _ in tokens if -200 < when < 4800], row - 0.42, row + 0.42, color=READER, lw=0.8)
    for start, ms in chunks:
        ax.add_patch(Rectangle((start, NUM_READERS - 0.3), ms, 1.5, fc=LONG, ec="white", lw=1.2))
    ax.axvline(0, color=INK, lw=0.9, ls=":")
    names = [*(f"reader {i + 1}" for i in range(NUM_READERS)), f"long prompt:\n{_sizes(len(chunks))}"]
    ax.set_yticks([*range(NUM_READERS), NUM_READERS + 0.45], names)
    ax.tick_params(axis="y", labelsize=9, length=0)
    ax.set_ylim(NUM_READERS + 1.3, -0.6)
    ax.spines["left"].set_visible(False)


def _sizes(num_chunks: int) -> str:
    """How the prompt is cut: every chunk takes what eight decodes leave of 256 tokens."""
    if num_chunks == 1:
        return f"{LONG_PROMPT:,} tokens"
    own = 256 - NUM_READERS
    return f"{num_chunks - 1} x {own} + {LONG_PROMPT - own * (num_chunks - 1)}"


# ---- the three requests


def three_requests(path: Path) -> None:
    """Which tokens each step computes, and how many, with whole prompts and with a budget of 6."""
    runs = {
        "whole prompts": list(run_example(example_core(num_kv_blocks=10))),
        f"budget {BUDGET}": list(
            run_example(example_core(num_kv_blocks=10, enable_chunked_prefill=True, max_num_batched_tokens=BUDGET))
        ),
    }
    figure, axes = plt.subplots(
        2, 2, figsize=(9, 5), sharex=True, sharey="row", layout="constrained", height_ratios=(1, 1.25)
    )
    for (cells, bars), (name, steps) in zip(axes.T, runs.items(), strict=True):
        _draw_cells(cells, steps)
        _draw_bars(bars, steps)
        most = max(sum(step.scheduled.values()) for step in steps)
        cells.set_title(f"{name}: {len(steps)} steps, at most {most} tokens in one", loc="left", fontsize=11)
        bars.set_xlabel("step")
        bars.axhline(BUDGET, color=INK, lw=1, ls="--")
    axes[1, 1].text(7, BUDGET + 0.25, f"budget {BUDGET}", ha="right", va="bottom", fontsize=10, color=INK)
    axes[1, 0].text(7, BUDGET + 0.25, f"{BUDGET}, not a limit here", ha="right", va="bottom", fontsize=10, color=INK)
    axes[1, 0].set_ylabel("tokens computed")
    axes[0, 0].set_ylabel("request")
    figure_files.save(figure, path)


def _draw_cells(ax: Axes, steps: Sequence[Step]) -> None:
    """A cell per request and step; its text is the positions that are computed, and below it the token that comes."""
    for row, name in enumerate("abc"):
        for step in steps:
            if name in step.scheduled:
                first, count = step.start[name], step.scheduled[name]
                label = str(first) if count == 1 else f"{first}-{first + count - 1}"
                ax.add_patch(Rectangle((step.number + 0.03, row - 0.42), 0.94, 0.84, fc=COLOURS[name], ec="none"))
                ink = INK if name == "b" else "white"
                ax.text(step.number + 0.5, row, label, ha="center", va="center", fontsize=9, color=ink)
                if step.sampled[name]:
                    ax.plot(step.number + 0.88, row - 0.26, "o", ms=4.5, mfc="white", mec=INK, mew=0.8)
        ax.plot([EXAMPLES[name].arrival] * 2, [row - 0.45, row + 0.45], color=INK, lw=2)
    ax.set_yticks(range(3), list("abc"))
    ax.set(xlim=(-0.1, 7.1), ylim=(2.6, -0.6))
    ax.set_xticks([i + 0.5 for i in range(7)], [str(i) for i in range(7)])
    ax.tick_params(axis="both", length=0)


def _draw_bars(ax: Axes, steps: Sequence[Step]) -> None:
    for step in steps:
        top = 0
        for name, count in step.scheduled.items():
            ax.bar(step.number + 0.5, count, width=0.84, bottom=top, color=COLOURS[name], ec="white", lw=1)
            ink = INK if name == "b" else "white"
            ax.text(step.number + 0.5, top + count / 2, f"{name} {count}", ha="center", va="center", fontsize=9,
                    color=ink)  # fmt: skip
            top += count
    ax.tick_params(axis="x", length=0)


# ---- what the chunks of c attend to


def attention(path: Path) -> None:
    """The 12 x 12 causal mask of c's prompt, cut into the strips of its three chunks."""
    steps = list(
        run_example(example_core(num_kv_blocks=10, enable_chunked_prefill=True, max_num_batched_tokens=BUDGET))
    )
    chunks = [(step.number, step.start["c"], step.scheduled["c"]) for step in steps if step.scheduled.get("c", 0) > 1]
    pieces = EXAMPLES["c"].pieces
    figure, ax = plt.subplots(figsize=(9, 4.6), layout="constrained")
    for number, first, count in chunks:
        for query in range(first, first + count):
            for key in range(query + 1):
                old = key < first
                fill = "#BFE3D8" if old else COLOURS["c"]
                ax.add_patch(Rectangle((key, query), 0.94, 0.94, fc=fill, ec="white", hatch="///" if old else None))
        pairs = sum(query + 1 for query in range(first, first + count))
        read = sum(1 for query in range(first, first + count) for key in range(first))
        text = f"step {number}: positions {first}-{first + count - 1}\n{pairs} pairs"
        text += f", {read} of them with keys\nthat earlier chunks computed" if read else ", all inside the chunk"
        ax.text(12.4, first + count / 2, text, va="center", fontsize=10, color=INK)
        ax.axhline(first, 0, 12 / 18.5, color=INK, lw=1.2)
    names = [f"{piece.strip()} {i}" for i, piece in enumerate(pieces)]
    ax.set_yticks([i + 0.5 for i in range(12)], names, fontsize=9)
    ax.set_xticks([i + 0.5 for i in range(12)], [str(i) for i in range(12)], fontsize=9)
    ax.set(xlim=(0, 18.5), ylim=(12, 0))
    ax.set_xlabel("key: position in c's prompt", x=6 / 18.5)
    ax.set_ylabel("query: token of c")
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    figure_files.save(figure, path)


# ---- what a budget costs


def chunk_times(path: Path) -> None:
    """The step time of every chunk of the prompt under a budget of 256: measured, and in both models."""
    ours, slower = modelled(256).chunks, modelled(256, calibrated()).chunks
    measured = [ms for _, ms in chunks_of(readers_tokens("m5+budget=256"))]
    assert len(ours) == len(measured)
    figure, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
    numbers = range(1, len(ours) + 1)
    ax.bar(numbers, measured, width=0.8, color=MEASURED, alpha=0.35)
    ax.plot(numbers, ours, "o-", color=MODELLED, ms=5)
    ax.plot(numbers, slower, "^-", color=SLOWER, ms=5)
    ax.text(12.3, 45, "bars: measured", ha="center", color=INK, fontsize=11)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    ax.text(9.6, 152, "the roofline", va="top", color=MODELLED, fontsize=11, bbox=box)
    ax.text(10.5, 320, "the calibrated model", ha="right", va="center", color=SLOWER, fontsize=11)
    ax.set_xticks(list(numbers))
    ax.set(xlabel="chunk of the prompt of 4,000 tokens (248 tokens each, the last one 32)", ylabel="ms per step")
    ax.set_ylim(0, 390)
    figure_files.save(figure, path)


def budget(path: Path) -> None:
    """ITL p99, TTFT and throughput against the budget: in both models, and measured."""
    measured: list[Mapping[str, float]] = result("tune_chunk_size.json")["results"]
    budgets = [16, 32, 64, 128, 256, 512, 1024, 2048, None]
    ours = [modelled(tokens) for tokens in budgets]
    slower = [modelled(tokens, calibrated()) for tokens in budgets]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.8), layout="constrained")
    panels = [
        ("ITL p99 of the readers, ms", "itl_p99", "itl_p99_ms"),
        ("TTFT of a long prompt, ms", "ttft", "ttft_long_ms"),
        ("all tokens per second", "tokens_per_second", "total_tok_per_s"),
    ]
    for ax, (title, field, name) in zip(axes, panels, strict=True):
        ax.plot([getattr(run, field) for run in ours], "o-", color=MODELLED, ms=4)
        ax.plot([getattr(run, field) for run in slower], "^-", color=SLOWER, ms=4)
        ax.plot([budgets.index(int(m["budget"])) for m in measured], [m[name] for m in measured], "s-", color=MEASURED,
                ms=4)  # fmt: skip
        ax.set_xticks(range(len(budgets)), [str(tokens or "off") for tokens in budgets], rotation=60)
        ax.set_title(title, fontsize=11)
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].set_yticks([10, 100, 1000], ["10", "100", "1,000"])
    axes[0].set_ylabel("logarithmic scale")
    axes[0].text(0.05, 0.94, "measured", color=MEASURED, transform=axes[0].transAxes, va="top")
    axes[0].text(0.05, 0.84, "calibrated", color=SLOWER, transform=axes[0].transAxes, va="top")
    axes[0].text(0.97, 0.08, "roofline", color=MODELLED, transform=axes[0].transAxes, ha="right")
    axes[1].set_ylim(0, 13_500)
    axes[1].set_yticks(range(0, 12_501, 2_500), [f"{ms:,}" for ms in range(0, 12_501, 2_500)])
    axes[2].set_ylim(0, 1_500)
    axes[2].set_yticks(range(0, 1_501, 500), [f"{rate:,}" for rate in range(0, 1_501, 500)])
    figure.supxlabel("max_num_batched_tokens (off: whole prompts)", fontsize=10)
    figure_files.save(figure, path)


FIGURES = {
    "05_stall": stall,
    "05_three_requests": three_requests,
    "05_attention": attention,
    "05_chunk_times": chunk_times,
    "05_budget": budget,
}


if __name__ == "__main__":
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__).parse_args().out)
