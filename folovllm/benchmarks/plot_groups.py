"""The pictures of the workloads of M5 and M6, and of an ablation.

Milestone: M5. vLLM counterpart: none. No torch. `plot` adds the title and writes the file.
"""

from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from folovllm.benchmarks.ablation import row_name
from folovllm.benchmarks.groups import groups_of, hit_rate_curves
from folovllm.benchmarks.scenarios import DECODING, LONG

Colours = dict[str, str]  # arm -> colour
STYLES = {"cold": "--", "warm": "-", "single": "-", "batch": "-"}
WORSE, BETTER = "#b0b0b0", "#2ca02c"


def draw_groups(result: dict[str, Any], colours: Colours) -> Figure | None:
    """The picture that belongs to the workload; None for one without groups."""
    groups = groups_of(result)
    if not groups:
        return None
    name = result["run"]["workload"]["name"]
    draw = {"long-prompts": _draw_arrivals, "shared-prefix": _draw_hit_rates}.get(name, _draw_turns)
    return draw(result, groups, colours)


def _draw_arrivals(result: dict[str, Any], groups: dict[tuple[str, str], Any], colours: Colours) -> Figure:
    """What a decoding request feels when a long prompt comes in, and what the long prompt pays."""
    figure, axes = plt.subplot_mosaic([["felt", "felt", "felt"], ["itl", "ttft", "speed"]], figsize=(14, 9))
    figure.set_layout_engine("constrained")
    arms = {arm: found for (arm, _), found in groups.items()}
    for arm, found in arms.items():
        gaps = found[DECODING]["gaps"]
        label = f"{arm} (worst gap {max(gap for _, gap in gaps):,.0f} ms)"
        axes["felt"].plot(*zip(*gaps, strict=True), label=label, color=colours[arm], linewidth=1.2, marker=".", ms=3)
    axes["felt"].set(yscale="log", xlabel="seconds since the start", ylabel="ms since its token before (log)")
    axes["felt"].set_title("What one of the decoding requests felt: every gap between two of its tokens")
    axes["felt"].grid(alpha=0.3, which="both")
    axes["felt"].legend()
    speeds = {arm: result["arms"][arm]["modes"][mode]["total_tok_per_s"] for arm, mode in groups}
    itl = {arm: found[DECODING]["itl_ms"]["p99"] for arm, found in arms.items()}
    ttft = {arm: found[LONG]["ttft_ms"]["p50"] for arm, found in arms.items() if LONG in found}
    bars(axes["itl"], itl, colours, "ITL p99 of the decoding requests", "ms")
    bars(axes["ttft"], ttft, colours, "TTFT of the long prompts (median)", "ms")
    bars(axes["speed"], speeds, colours, "Total throughput, prompts included", "tokens / s")
    return figure


def _draw_hit_rates(result: dict[str, Any], groups: dict[tuple[str, str], Any], colours: Colours) -> Figure:
    """TTFT against the share of the prompt that the cache may hold, and how much faster than cold that is."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
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
    axes[0].set(ylabel="ms to the first token", title="Time to first token", ylim=(0, None))
    axes[1].set(
        ylabel="times faster than the first of its kind", title="What the cached prefix is worth", ylim=(0, None)
    )
    for ax in axes:
        ax.set_xlabel("% of the 1,500-token prompt that others share")
        ax.margins(x=0.08)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure


def _draw_turns(result: dict[str, Any], groups: dict[tuple[str, str], Any], colours: Colours) -> Figure:
    """TTFT and cache hits, by turn where there are turns; the cache cold (dashed) and warm."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    many = len(next(iter(groups.values()))) > 1
    panels = (
        ("TTFT, median", "ms", lambda f: f["ttft_ms"]["p50"]),
        ("Prompt found in the cache", "%", _percent_cached),
    )
    for ax, (title, unit, value) in zip(axes, panels, strict=False):
        if many:
            for (arm, mode), found in groups.items():
                heights = [value(figures) for figures in found.values()]
                ax.plot(list(found), heights, STYLES[mode], marker="o", label=f"{arm} {mode}", color=colours[arm])
            ax.set(title=title, ylabel=unit, ylim=(0, 104 if unit == "%" else None))
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
        else:
            single = {f"{arm}\n{mode}": value(next(iter(found.values()))) for (arm, mode), found in groups.items()}
            bars(ax, single, _by_label(groups, colours), title, unit)
    speeds = {f"{arm}\n{mode}": result["arms"][arm]["modes"][mode]["output_tok_per_s"] for arm, mode in groups}
    bars(axes[2], speeds, _by_label(groups, colours), "Throughput", "output tokens / s")
    return figure


def _percent_cached(figures: dict[str, Any]) -> float:
    return 100 * float(figures["cached_share"])


def _by_label(groups: dict[tuple[str, str], Any], colours: Colours) -> Colours:
    return {f"{arm}\n{mode}": colours[arm] for arm, mode in groups}


def draw_ablation(result: dict[str, Any], colours: Colours) -> Figure | None:
    """Per mode, how much slower it is without each rung; None without --ablate."""
    rows = [row for row in result.get("ablation", []) if row["off"]]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    if not rows:
        return None
    height = 1.6 + 0.5 * len(rows) / len(modes)
    figure, axes = plt.subplots(1, 2 * len(modes), figsize=(7 * 2 * len(modes), height), layout="constrained")
    for i, mode in enumerate(modes):
        shown = [row for row in rows if row["mode"] == mode][::-1]
        names = [row_name(row) for row in shown]
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


def bars(ax: Axes, heights: dict[str, float | None], colours: Colours, title: str, unit: str) -> None:
    """One labelled bar per name."""
    values = [height or 0 for height in heights.values()]
    found = ax.bar(list(heights), values, color=[colours[name] for name in heights])
    ax.bar_label(found, [f"{v:,.0f}" if v >= 10 else f"{v:.2g}" for v in values], fontsize=9, padding=2)
    ax.set(title=title, ylabel=unit)
    ax.margins(y=0.12)
