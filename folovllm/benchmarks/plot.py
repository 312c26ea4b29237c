"""The plots of a result, as PNG: speeds, KV slots and latencies; also a sweep, a fit, groups of requests, an ablation.

Milestone: M1; groups and ablation came with M5. vLLM counterpart: none. No torch. Arms are named as report.name_arms
leaves them. A picture is as wide as GitHub shows a page, 900 pixels, so that its text is not made smaller there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: no window system needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from folovllm.benchmarks.arms import BASELINE
from folovllm.benchmarks.report import headline, modes_of, rung_off
from folovllm.benchmarks.workloads import DECODING, LONG

MODE_COLOURS = {"single": "#4c78a8", "batch": "#f58518", "cold": "#4c78a8", "warm": "#f58518"}
BASELINE_GREY = "#7f7f7f"
ARM_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
WORSE, BETTER = "#b0b0b0", "#2ca02c"
MODE_TITLES = {"single": "one by one", "batch": "together", "cold": "cold", "warm": "warm"}
STYLES = {"cold": "--", "warm": "-", "single": "-", "batch": "-"}
DPI = 100
WIDTH = 9  # inches

Result = dict[str, Any]
Colours = dict[str, str]  # arm -> colour
Groups = dict[tuple[str, str], Result]  # (arm, mode) -> figures per group


def write_plots(result: Result, folder: Path, stem: str) -> list[Path]:
    """Draw what there is to draw; returns the files."""
    arms = {name: arm for name, arm in result["arms"].items() if "modes" in arm}
    if not arms:
        return []
    figures = {
        f"{stem}.png": draw_speeds(result, arms),
        f"{stem}_slots.png": draw_slots(arms),
        f"{stem}_latency.png": draw_latencies(result, arms),
        f"{stem}_batching.png": draw_batching(result, arms),
        f"{stem}_groups.png": draw_groups(result, colours_of(arms)),
        f"{stem}_ablation.png": draw_ablation(result),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            figure.suptitle(headline(result), fontsize=9)
            paths.append(save(figure, folder / name))
    return paths


def save(figure: Figure, path: Path, dpi: int = DPI, description: str | None = None) -> Path:
    """Write the PNG, with the same bytes in every run. `description` becomes a text inside the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata={"Software": None, "Description": description})
    plt.close(figure)
    return path


def colours_of(arms: Result) -> Colours:
    """The baseline grey, ours in colours that stay the same from plot to plot of one result."""
    ours = [name for name in arms if name != BASELINE]
    colours = {name: ARM_COLOURS[i % len(ARM_COLOURS)] for i, name in enumerate(ours)}
    return {name: colours.get(name, BASELINE_GREY) for name in arms}


class Series(NamedTuple):
    """Bars of one kind: a height per name, and the texts on them if they are not the heights."""

    label: str
    heights: Sequence[float | None]
    colour: str | list[str]  # of all bars, or of each
    alpha: float = 1.0
    texts: list[str] | None = None


def bars(ax: Axes, names: Sequence[str], series: Sequence[Series], title: str, unit: str) -> None:
    """Side by side, the bars of every series above each name."""
    width = 0.84 / len(series)
    for i, one in enumerate(series):
        heights = [height or 0 for height in one.heights]
        places = [x + (i - (len(series) - 1) / 2) * width for x in range(len(names))]
        drawn = ax.bar(places, heights, width * 0.95, label=one.label, color=one.colour, alpha=one.alpha)
        texts = one.texts or [f"{height:,.0f}" if height >= 10 else f"{height:.2g}" for height in heights]
        ax.bar_label(drawn, texts, fontsize=8 if len(series) < 3 else 7, padding=2)
    labels = [name.replace(" without ", "\nwithout\n") for name in names]
    ax.set_xticks(range(len(names)), labels, fontsize=9 if len(names) < 6 else 8)
    ax.margins(y=0.18)
    ax.set_title(title, fontsize=10)
    ax.set_ylabel(unit)
    if len(series) > 1:
        ax.legend(fontsize=8, ncols=2)


def bars_by_arm(ax: Axes, heights: dict[str, float | None], colours: Colours, title: str, unit: str) -> None:
    """One bar per arm, in the arm's colour."""
    bars(ax, list(heights), [Series("", list(heights.values()), [colours[name] for name in heights])], title, unit)


def draw_speeds(result: Result, arms: Result) -> Figure:
    """Output tokens per second, a panel per mode."""
    modes = _modes(arms)
    figure, axes = _panels_of_arms(arms, len(modes))
    for ax, mode in zip(axes, modes, strict=True):
        speeds = [arm["modes"][mode]["output_tok_per_s"] for arm in arms.values()]
        colours = [BASELINE_GREY if name == BASELINE else MODE_COLOURS[mode] for name in arms]
        drawn = ax.barh(range(len(arms)), speeds, 0.7, color=colours)
        ax.bar_label(drawn, [f"{speed:,.0f}" for speed in speeds], fontsize=10, padding=3)
        ax.set_title(f"Output tokens per second, {_requests_of(result, mode)}", fontsize=10)
        ax.set_xlim(0, 1.15 * max(speeds))
    return figure


def draw_latencies(result: Result, arms: Result) -> Figure:
    """TTFT and ITL in the mode with most requests at once: a bar to p50, and from there a line to p99."""
    mode = _modes(arms)[-1]
    figure, axes = _panels_of_arms(arms, 2)
    for ax, key, title in zip(axes, ("ttft_ms", "itl_ms"), ("Time to first token", "Time between tokens"), strict=True):
        for place, (name, arm) in enumerate(arms.items()):
            p50, p99 = (arm["modes"][mode][key][q] or 0 for q in ("p50", "p99"))
            ax.barh(place, p50, 0.7, color=BASELINE_GREY if name == BASELINE else MODE_COLOURS[mode])
            ax.plot([p50, p99], [place, place], color="black", linewidth=1, marker="|", markevery=[1])
            ax.text(1.15 * max(p50, p99), place, f"{p50:,.0f} / {p99:,.0f}", va="center", fontsize=9)
        ax.set_title(f"{title}, {_requests_of(result, mode)}\nms: bar to p50, line to p99", fontsize=10)
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        ax.set_xlim(low, high * (high / low) ** 0.35)  # room for the texts
    return figure


def _panels_of_arms(arms: Result, count: int) -> tuple[Figure, Sequence[Axes]]:
    """Panels side by side that share a row per arm, the first arm on top."""
    figure, axes = plt.subplots(
        1, count, figsize=(WIDTH, 1.1 + 0.32 * len(arms)), layout="constrained", sharey=True, squeeze=False
    )
    names = ["HuggingFace" if name == BASELINE else name for name in arms]
    axes[0][0].set_yticks(range(len(arms)), names, fontsize=10)
    axes[0][0].set_ylim(len(arms) - 0.5, -0.5)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(axis="x", labelsize=9)
    return figure, axes[0]


def _requests_of(result: Result, mode: str) -> str:
    """E.g. "32 requests together"."""
    count = result["run"]["workload"].get("num_requests", {}).get(mode)
    return f"{count} requests {MODE_TITLES[mode]}" if count else MODE_TITLES[mode]


def draw_slots(arms: Result) -> Figure:
    """Used over reserved slots against time, in the mode with most requests at once."""
    figure, ax = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    mode = _modes(arms)[-1]
    for name, colour in colours_of(arms).items():
        figures = arms[name]["modes"][mode]
        points = [point for point in figures["kv_series"] if point[3]]
        seconds, shares = [point[0] for point in points], [100 * point[2] / point[3] for point in points]
        mean = figures["kv_utilisation"]
        shown = "HuggingFace" if name == BASELINE else name
        label = f"{shown}, mean {mean:.0%}" if mean is not None else shown
        ax.plot(seconds, shares, label=label, color=colour, linewidth=1.6)
    ax.set_title(f"Reserved KV slots that hold a token, % ({MODE_TITLES[mode]})", fontsize=10)
    ax.set(ylim=(0, 104), xlabel="seconds since the requests were sent", xlim=(0, None))
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9)
    return figure


def _modes(arms: Result) -> list[str]:
    return list(next(iter(arms.values()))["modes"])


def _grid_and_legend(ax: Axes) -> None:
    ax.grid(alpha=0.3, which="both")
    ax.legend(fontsize=8)


def draw_batching(result: Result, arms: Result) -> Figure | None:
    """None without --batch-sizes and --fit."""
    sweep = {name: arm["sweep"] for name, arm in arms.items() if arm["sweep"]}
    fit = {name: fit for name, fit in result["fit"].items() if fit["ok"]}
    panels = [(draw, data) for draw, data in ((_sweep, sweep), (_fit, fit)) if data]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.8), layout="constrained", squeeze=False)
    for ax, (draw, data) in zip(axes[0], panels, strict=True):
        draw(ax, data)
    return figure


def _sweep(ax: Axes, sweep: Result) -> None:
    for name, colour in colours_of(sweep).items():
        sizes, speeds = zip(*((p["batch_size"], p["output_tok_per_s"]) for p in sweep[name]), strict=True)
        ax.plot(sizes, speeds, marker="o", label=name, color=colour)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
    ax.minorticks_off()
    ax.set(title="Throughput against batch size", xlabel="requests sent at once", ylabel="output tokens / s")
    ax.set_ylim(bottom=0)
    _grid_and_legend(ax)


def _fit(ax: Axes, fit: Result) -> None:
    kinds = (("max_running", "most", "single"), ("mean_running", "mean over steps", "batch"))
    series = [Series(label, [f[key] for f in fit.values()], MODE_COLOURS[mode]) for key, label, mode in kinds]
    names = [f"{name}\n{figures['preemptions']:.0f} preempted" for name, figures in fit.items()]
    kv_bytes = max(figures["kv_cache"]["allocated_bytes"] for figures in fit.values())
    bars(ax, names, series, f"Requests running together in {kv_bytes / 2**20:.1f} MiB of KV cache", "requests")


def draw_groups(result: Result, colours: Colours) -> Figure | None:
    """The picture that belongs to the workload; None for one without groups."""
    groups = {(name, mode): figures["groups"] for name, mode, figures in modes_of(result) if figures.get("groups")}
    if not groups:
        return None
    name = result["run"]["workload"]["name"]
    draw = {"long-prompts": _draw_arrivals, "shared-prefix": _draw_hit_rates}.get(name, _draw_turns)
    return draw(result, groups, colours)


def _draw_arrivals(result: Result, groups: Groups, colours: Colours) -> Figure:
    """What a decoding request feels when a long prompt comes in, and what the long prompt pays."""
    figure, axes = plt.subplot_mosaic([["felt", "felt", "felt"], ["itl", "ttft", "speed"]], figsize=(WIDTH, 6.4))
    figure.set_layout_engine("constrained")
    arms = {arm: found for (arm, _), found in groups.items()}
    for arm, found in arms.items():
        gaps = found[DECODING]["gaps"]
        label = f"{arm} (worst gap {max(gap for _, gap in gaps):,.0f} ms)"
        axes["felt"].plot(*zip(*gaps, strict=True), label=label, color=colours[arm], linewidth=1.2, marker=".", ms=3)
    axes["felt"].set(yscale="log", xlabel="seconds since the start", ylabel="ms since its token before (log)")
    axes["felt"].set_title("Every gap between two tokens of one of the decoding requests", fontsize=10)
    _grid_and_legend(axes["felt"])
    speeds = {arm: result["arms"][arm]["modes"][mode]["total_tok_per_s"] for arm, mode in groups}
    itl = {arm: found[DECODING]["itl_ms"]["p99"] for arm, found in arms.items()}
    ttft = {arm: found[LONG]["ttft_ms"]["p50"] for arm, found in arms.items() if LONG in found}
    bars_by_arm(axes["itl"], itl, colours, "ITL p99, decoding requests", "ms")
    bars_by_arm(axes["ttft"], ttft, colours, "TTFT of long prompts, median", "ms")
    bars_by_arm(axes["speed"], speeds, colours, "Throughput with prompts", "tokens / s")
    return figure


def _draw_hit_rates(result: Result, groups: Groups, colours: Colours) -> Figure:
    """TTFT against the share of the prompt that the cache may hold, and how much faster than cold that is."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8), layout="constrained")
    for (arm, _), found in groups.items():
        curves = hit_rate_curves(found)
        for state, points in curves.items():
            label = f"{arm}, {'first of its kind' if state == 'cold' else 'prefix seen before'}"
            axes[0].plot(*zip(*points, strict=True), STYLES[state], marker="o", ms=4, label=label, color=colours[arm])
        cold = dict(curves.get("cold", []))
        ratios = [(rate, cold[rate] / ttft) for rate, ttft in curves.get("warm", []) if rate in cold]
        if ratios:
            axes[1].plot(*zip(*ratios, strict=True), marker="o", label=arm, color=colours[arm])
            axes[1].annotate(f"{ratios[-1][1]:.1f}x", ratios[-1], (0, 6), textcoords="offset points", ha="center")
    axes[0].set(ylabel="ms")
    axes[0].set_title("Time to first token", fontsize=10)
    axes[1].set(ylabel="times faster than the first of its kind")
    axes[1].set_title("What the cached prefix is worth", fontsize=10)
    for ax in axes:
        top = 1.1 * ax.dataLim.ymax  # room for the ratio above the last point
        ax.set(xlabel="% of the prompt that others share", ylim=(0, top))
        ax.margins(x=0.08)
        _grid_and_legend(ax)
    return figure


def hit_rate_curves(groups: Result) -> dict[str, list[tuple[int, float]]]:
    """ "cold" and "warm" -> (hit rate, median TTFT in ms), rising. Groups are called "25% warm" and the like."""
    curves: dict[str, list[tuple[int, float]]] = {"cold": [], "warm": []}
    for name, figures in groups.items():
        rate, _, state = name.partition("% ")
        curves[state].append((int(rate), figures["ttft_ms"]["p50"]))
    return {state: sorted(points) for state, points in curves.items() if points}


def _draw_turns(result: Result, groups: Groups, colours: Colours) -> Figure:
    """TTFT and cache hits, by turn where there are turns; the cache cold (dashed) and warm."""
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.6), layout="constrained")
    ttft = {key: {name: figures["ttft_ms"]["p50"] for name, figures in found.items()} for key, found in groups.items()}
    cached = {key: {name: 100 * f["cached_share"] for name, f in found.items()} for key, found in groups.items()}
    _by_turn(axes[0], ttft, colours, "TTFT, median", "ms", None)
    _by_turn(axes[1], cached, colours, "Prompt found in the cache", "%", 104)
    speeds = {(arm, mode): {"": result["arms"][arm]["modes"][mode]["output_tok_per_s"]} for arm, mode in groups}
    _by_turn(axes[2], speeds, colours, "Throughput", "output tokens / s", None)
    return figure


def _by_turn(ax: Axes, values: Groups, colours: Colours, title: str, unit: str, top: float | None) -> None:
    """A line per arm and mode over the groups; if there is only one group, a bar."""
    if all(len(found) == 1 for found in values.values()):
        heights = {f"{arm}\n{mode}": next(iter(found.values())) for (arm, mode), found in values.items()}
        bars_by_arm(ax, heights, {f"{arm}\n{mode}": colours[arm] for arm, mode in values}, title, unit)
        return
    for (arm, mode), found in values.items():
        ax.plot(*zip(*found.items(), strict=True), STYLES[mode], marker="o", label=f"{arm} {mode}", color=colours[arm])
    ax.set_title(title, fontsize=10)
    ax.set(ylabel=unit, ylim=(0, top))
    _grid_and_legend(ax)


def draw_ablation(result: Result) -> Figure | None:
    """Per mode, how much slower it is without each rung; None without --ablate."""
    rows = [row for row in result.get("ablation", []) if row["off"]]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    if not rows:
        return None
    height = 1.6 + 0.5 * len(rows) / len(modes)
    figure, axes = plt.subplots(1, 2 * len(modes), figsize=(7 * 2 * len(modes), height), layout="constrained")
    for i, mode in enumerate(modes):
        shown = [row for row in rows if row["mode"] == mode][::-1]
        names = [rung_off(row) for row in shown]
        whole = next(row for row in result["ablation"] if row["mode"] == mode and not row["off"])
        worth = [row["worth"] for row in shown]
        _factors(axes[2 * i], names, worth, f"Throughput with it / without it ({mode})")
        gaps = [(row["itl_ms_p99"] or 0) / (whole["itl_ms_p99"] or 1) for row in shown]
        _factors(axes[2 * i + 1], names, gaps, f"ITL p99 without it / with it ({mode})")
    return figure


def _factors(ax: Axes, names: list[str], factors: list[float], title: str) -> None:
    """Bars that start at 1: to the right the rung helps, to the left it costs."""
    shades = [BETTER if factor >= 1 else WORSE for factor in factors]
    found = ax.barh(names, [factor - 1 for factor in factors], left=1, color=shades)
    ax.bar_label(found, [f"{factor:.2f}x" for factor in factors], padding=3)
    ax.axvline(1, color="black", linewidth=1)
    ax.set_title(title)
    ax.margins(x=0.18)
