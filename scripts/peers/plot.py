"""The picture of a comparison: one panel per mode, one bar per engine, whiskers from the lowest to the highest repeat.

Milestone: M4. vLLM counterpart: none. No torch. Prompts of many lengths share one panel, with a line per engine.
"""

from pathlib import Path
from typing import Any

from folovllm.benchmarks.machine import commit_of
from folovllm.benchmarks.plot import ARM_COLOURS, BASELINE_GREY, MODE_COLOURS, WIDTH, plt, save
from folovllm.benchmarks.workloads import prompt_length
from scripts.peers.comparison import speed_name
from scripts.peers.report import column_modes, condition, lengths_apart

TITLES = {"single": "{n} requests one after another", "batch": "{n} requests at once"}
PROMPT_COLOUR = "#54a24b"
CURVE_HEIGHT = 3.6  # inches


def write_plot(result: dict[str, Any], path: Path) -> list[Path]:
    """Ours in colour, the peers grey, the number and our ratio at each bar; nothing if nothing was measured.

    If there are bars and curves, the curves are below the bars.
    """
    arms = [arm for arm in result["arms"].values() if "modes" in arm]
    if not arms:
        return []
    modes, lengths = column_modes(result["run"]), lengths_apart(result["run"])
    heights = ([1.0 + 0.46 * len(arms)] if modes else []) + ([CURVE_HEIGHT] if lengths else [])
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    figure.suptitle(_title(result), fontsize=9)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if modes:
        _panels(parts[0], result, arms, modes)
    if lengths:
        _curves(parts[-1].subplots(), arms, lengths)
    return [save(figure, path)]


def _panels(figure: Any, result: dict[str, Any], arms: list[dict[str, Any]], modes: list[str]) -> None:
    axes = figure.subplots(1, len(modes), squeeze=False, sharey=True)
    for ax, mode in zip(axes[0], modes, strict=True):
        _bars(ax, arms, mode)
        ax.set_title(_panel_title(mode, result["run"]["workload"]["num_requests"][mode]), fontsize=10)
        if mode == "single" and "floor_tok_per_s" in result["bandwidth"]:
            _floor(ax, result["bandwidth"]["floor_tok_per_s"], result["run"]["dtype"])


def _panel_title(mode: str, count: int) -> str:
    length = prompt_length(mode)
    return f"prompts of {length:,}: their tokens" if length else TITLES[mode].format(n=count)


def _curves(ax: Any, arms: list[dict[str, Any]], modes: list[str]) -> None:
    """Prompt tokens per second against the length of the prompt, from the lowest to the highest repeat."""
    lengths = [prompt_length(mode) for mode in modes]
    for arm, colour in zip(arms, ARM_COLOURS, strict=False):
        speeds = [arm["modes"][mode][speed_name(mode)] for mode in modes]
        ax.plot(lengths, [s["median"] for s in speeds], marker="o", label=arm["label"].partition(" m")[0], color=colour)
        ax.fill_between(lengths, [s["min"] for s in speeds], [s["max"] for s in speeds], color=colour, alpha=0.2)
    ax.set_xscale("log")
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
    ax.minorticks_off()
    ax.set(xlabel="tokens of the prompt", ylabel="prompt tokens per second", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _bars(ax: Any, arms: list[dict[str, Any]], mode: str) -> None:
    speeds = [arm["modes"][mode][speed_name(mode)] for arm in arms]
    middles = [speed["median"] for speed in speeds]
    whiskers = [[s["median"] - s["min"] for s in speeds], [s["max"] - s["median"] for s in speeds]]
    colour = MODE_COLOURS.get(mode, PROMPT_COLOUR)
    colours = [BASELINE_GREY if "ratio" in arm["modes"][mode] else colour for arm in arms]
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
    what = "Output" if any(speed_name(mode) == "output_tok_per_s" for mode in run["modes"]) else "Prompt"
    pairs = f"median and range of {run['repeats']} pairs" if run["repeats"] > 1 else "one pair each"
    return (
        f"{what} tokens per second; {run['model']}, workload {run['workload']['name']}, {machine['cpu']},\n"
        f"{run['threads']} threads{condition(run)}, {pairs}, "
        f"commit {commit_of(machine)}, {result['date'][:10]}"
    )
