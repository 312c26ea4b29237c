"""Draws the pictures of docs/learn/vllm_traces.md from the recorded traces: FoloVLLM above, vLLM below.

Milestone: M6. vLLM counterpart: none. No torch, no weights, a second:

    python scripts/dev/draw_vllm_figures.py [--out docs/learn/img]
"""

from pathlib import Path

import figure_files
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from folovllm import viz
from folovllm.trace.diff import diff
from folovllm.trace.record import Trace, read_trace

TRACES = figure_files.ROOT / "docs/data/vllm_traces"
MARK = "#d62728"


def pair(name: str) -> tuple[Trace, Trace]:
    return read_trace(TRACES / f"{name}.folovllm.jsonl"), read_trace(TRACES / f"{name}.vllm.jsonl")


def draw_pair(name: str, path: Path, marked: str, texts: tuple[str, str], text_row: int) -> None:
    """The two runs as Gantt charts. The row of request `marked` is framed where the engines first compute something
    else for it, with a text for each engine in row `text_row`.
    """
    traces = pair(name)
    step = _first_other_work(traces, marked)
    figure, axes = plt.subplots(2, 1, figsize=(9, 5.2), sharex=True, layout="constrained")
    for ax, trace, engine, text in zip(axes, traces, ("FoloVLLM", "vLLM"), texts, strict=True):
        arrivals = _arrivals(trace)
        viz.gantt(ax, [record["sched"] for record in trace.steps], arrivals, viz.colours_of(arrivals))
        row = list(arrivals).index(marked)
        ax.add_patch(Rectangle((step, row - 0.47), 1, 0.94, fill=False, ec=MARK, lw=2, zorder=5))
        ax.annotate(
            text, (step + 1, row), (step + 2.2, text_row), color=MARK, size=9, va="center", zorder=6,
            arrowprops={"arrowstyle": "-", "color": MARK}, bbox={"fc": "white", "ec": "none", "pad": 1},
        )  # fmt: skip
        ax.set_title(engine, loc="left", fontsize=10)
        for label in ax.texts:
            label.set_size(9)
    num_steps = max(len(trace.steps) for trace in traces)
    axes[0].set_xlim(0, num_steps)
    axes[1].set_xticks(range(0, num_steps + 1, 2))
    axes[1].set_xlabel("step")
    handles = [
        Patch(fc="white", ec=viz.INK, hatch="////", label="prompt: so many tokens in the step"),
        Patch(fc="white", ec=viz.INK, label="one token"),
        Line2D([], [], color="#999999", label="preempted, waits"),
        Line2D([], [], color=viz.INK, marker="|", ls="none", markersize=9, label="arrives"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure_files.save(figure, path)


def _first_other_work(traces: tuple[Trace, Trace], request_id: str) -> int:
    assert diff(*traces) is not None
    for a, b in zip(traces[0].steps, traces[1].steps, strict=False):
        work = [[(e["start"], e["n"]) for e in record["sched"] if e["req"] == request_id] for record in (a, b)]
        if work[0] != work[1]:
            return a["step"]
    raise AssertionError(f"both engines compute the same for {request_id}")


def _arrivals(trace: Trace) -> dict[str, int]:
    return {e[1]: record["step"] for record in trace.steps for e in record["events"] if e[0] == "add"}


def long_prompt(path: Path) -> None:
    draw_pair(
        "long_prompt", path, "long", ("alone, and still 64 tokens per step", "alone, so the limit is lifted: 128"), 1
    )


def urgent(path: Path) -> None:
    texts = ("8 blocks are hit: 256 tokens", "9 blocks are hit, and the ninth was never computed")
    draw_pair("urgent", path, "patient", texts, 3)


FIGURES = {"vllm_long_prompt": long_prompt, "vllm_urgent": urgent}


def main() -> None:
    figure_files.draw_all(FIGURES, figure_files.parser(__doc__ or "").parse_args().out)


if __name__ == "__main__":
    main()
