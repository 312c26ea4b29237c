"""The picture of a comparison: one panel per mode, one bar per engine, whiskers from the lowest to the highest repeat.

Milestone: M4. vLLM counterpart: none. No torch.
"""

from pathlib import Path
from typing import Any

from folovllm.benchmarks.machine import commit_of
from folovllm.benchmarks.plot import BASELINE_GREY, MODE_COLOURS, WIDTH, plt, save

TITLES = {"single": "{n} requests one after another", "batch": "{n} requests at once"}


def write_plot(result: dict[str, Any], path: Path) -> list[Path]:
    """Ours in colour, the peers grey, the number and our ratio at each bar; nothing if nothing was measured."""
    arms = [arm for arm in result["arms"].values() if "modes" in arm]
    if not arms:
        return []
    modes = result["run"]["modes"]
    height = 1.0 + 0.46 * len(arms)
    figure, axes = plt.subplots(
        1, len(modes), figsize=(WIDTH, height), layout="constrained", squeeze=False, sharey=True
    )
    figure.suptitle(_title(result), fontsize=9)
    for ax, mode in zip(axes[0], modes, strict=True):
        _bars(ax, arms, mode)
        ax.set_title(TITLES[mode].format(n=result["run"]["workload"]["num_requests"][mode]), fontsize=10)
        if mode == "single" and "floor_tok_per_s" in result["bandwidth"]:
            _floor(ax, result["bandwidth"]["floor_tok_per_s"], result["run"]["dtype"])
    return [save(figure, path)]


def _bars(ax: Any, arms: list[dict[str, Any]], mode: str) -> None:
    speeds = [arm["modes"][mode]["output_tok_per_s"] for arm in arms]
    middles = [speed["median"] for speed in speeds]
    whiskers = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
    colours = [BASELINE_GREY if "ratio" in arm["modes"][mode] else MODE_COLOURS[mode] for arm in arms]
    places = range(len(arms))
    ax.barh(places, middles, xerr=whiskers, color=colours, error_kw={"elinewidth": 1, "capsize": 3})
    for place, arm, speed in zip(places, arms, speeds, strict=True):
        ratio = arm["modes"][mode].get("ratio")
        label = f"{speed['median']:.0f}" + (f"  (ours {ratio['median']:.2f}x)" if ratio else "")
        text = ax.annotate(label, (speed["max"], place), (5, 0), textcoords="offset points", va="center", fontsize=9)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # above the line of the floor
    ax.set_yticks(places, [f"{arm['label'].partition(' m')[0]}\n{arm['weights']}" for arm in arms], fontsize=9)
    ax.set_ylim(len(arms) - 0.1, -0.6)  # ours on top, and room for the name of the floor below
    ax.set_xlim(0, 1.4 * max(speed["max"] for speed in speeds))
    ax.tick_params(axis="x", labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _floor(ax: Any, floor: float, dtype: str) -> None:
    """A line at the floor, named at its foot, where the slower engines leave room."""
    ax.axvline(floor, color="black", linestyle="--", linewidth=1)
    text = f"floor for {dtype}: {floor:.0f}"
    label = ax.annotate(text, (floor, ax.get_ylim()[0] - 0.05), (-4, 0), textcoords="offset points", fontsize=9)
    label.set(ha="right", va="bottom")
    label.set_in_layout(False)  # a floor far to the right must not squeeze the bars


def _title(result: dict[str, Any]) -> str:
    run, machine = result["run"], result["machine"]
    return (
        f"Output tokens per second; {run['model']}, workload {run['workload']['name']}, {machine['cpu']},\n"
        f"{run['threads']} threads, median and range of {run['repeats']} pairs, "
        f"commit {commit_of(machine)}, {result['date'][:10]}"
    )
