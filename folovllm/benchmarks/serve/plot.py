"""The picture of a run: how the latencies are distributed, and how the load and the gaps went over time.

Milestone: M8. vLLM counterpart: none. No torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from folovllm.benchmarks.plot import WIDTH, plt, save
from folovllm.benchmarks.serve.answers import Answer
from folovllm.benchmarks.serve.metrics import in_flight, seconds_of
from folovllm.benchmarks.serve.report import headline
from folovllm.utils import percentile

SHOWN = {"ttft": "TTFT, of each request", "tpot": "TPOT, of each request", "itl": "ITL, of each chunk"}
FILL, LINE = "#4c78a8", "#f58518"
NUM_BINS = 40


def write_plot(result: dict[str, Any], answers: Sequence[Answer], path: Path) -> Path:
    """Distributions above, the run over time below. Failed requests are in the count of requests in flight only."""
    good = [answer for answer in answers if answer.error is None]
    figure, axes = plt.subplot_mosaic([["ttft", "tpot", "itl"], ["flight"] * 3, ["gaps"] * 3], figsize=(WIDTH, 8))
    figure.set_layout_engine("constrained")
    figure.suptitle(headline(result), fontsize=9)
    for name, title in SHOWN.items():
        _draw_distribution(axes[name], [1e3 * s for answer in good for s in seconds_of(name, answer)], title)
    moments, counts = zip(*[(0.0, 0), *in_flight(answers)], strict=True)
    axes["flight"].fill_between(moments, counts, step="post", color=FILL, alpha=0.4)
    axes["flight"].set(ylabel="requests", ylim=(0, None))
    axes["flight"].set_title("Requests in flight: sent and not yet answered", fontsize=10)
    gaps = [gap for answer in good for gap in zip(answer.token_times[1:], answer.inter_token_latencies, strict=True)]
    axes["gaps"].plot([moment for moment, _ in gaps], [1e3 * gap for _, gap in gaps], ".", ms=2, color=FILL)
    axes["gaps"].set(ylabel="ms", ylim=(0, None), xlabel="seconds since the start")
    axes["gaps"].set_title("ITL over time: each point is a chunk and the gap before it", fontsize=10)
    for name in ("flight", "gaps"):
        axes[name].set_xlim(0, result["figures"]["duration"])
        axes[name].grid(alpha=0.3)
    return save(figure, path)


def _draw_distribution(ax: Any, ms: list[float], title: str) -> None:
    """A histogram with lines at p50 and p99."""
    ax.set_title(title, fontsize=10)
    ax.set(xlabel="ms")
    if not ms:
        ax.text(0.5, 0.5, "none", ha="center", transform=ax.transAxes)
        return
    ax.hist(ms, NUM_BINS, color=FILL)
    for q, style in ((50, "-"), (99, "--")):
        value = percentile(ms, q) or 0.0
        ax.axvline(value, color=LINE, linestyle=style, label=f"p{q} {value:,.1f}")
    ax.legend(fontsize=8)
