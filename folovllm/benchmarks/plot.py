"""The plots of a result, as PNG.

Milestone: M1. vLLM counterpart: none. No torch.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no window system needed

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from folovllm.benchmarks.plot_groups import draw_ablation, draw_groups

MODE_COLOURS = {"single": "#4c78a8", "batch": "#f58518", "cold": "#4c78a8", "warm": "#f58518"}
BASELINE_GREY = "#7f7f7f"
ARM_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
PERCENTILES = (("p50", 1.0), ("p99", 0.45))  # and how opaque its bar is
DPI = 110


def write_plots(result: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """The overview, and one more where there was a sweep, a fit, groups or an ablation; returns what was written."""
    arms = {name: arm for name, arm in result["arms"].items() if "modes" in arm}
    if not arms:
        return []
    paths = [_overview(result, arms, folder / f"{stem}.png")]
    sweep = {name: arm["sweep"] for name, arm in arms.items() if arm["sweep"]}
    fit = {name: fit for name, fit in result["fit"].items() if fit["ok"]}
    if sweep or fit:
        paths.append(_batching(result, sweep, fit, folder / f"{stem}_batching.png"))
    for name, draw in (("groups", draw_groups), ("ablation", draw_ablation)):
        figure = draw(result, colours_of(arms))
        if figure is not None:
            figure.suptitle(title_of(result), fontsize=10)
            paths.append(_save(figure, folder / f"{stem}_{name}.png"))
    return paths


def _overview(result: dict[str, Any], arms: dict[str, Any], path: Path) -> Path:
    figure, axes = plt.subplots(2, 2, figsize=(14, 9), layout="constrained")
    figure.suptitle(title_of(result), fontsize=11)
    _throughput(axes[0][0], arms, result["reference"])
    _utilisation(axes[0][1], arms)
    _latency(axes[1][0], arms, "ttft_ms", "Time to first token (in a batch: the queue included)")
    _latency(axes[1][1], arms, "itl_ms", "Time between tokens")
    return _save(figure, path)


def _batching(result: dict[str, Any], sweep: dict[str, Any], fit: dict[str, Any], path: Path) -> Path:
    panels = [panel for panel in (sweep, fit) if panel]
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 4.8), layout="constrained", squeeze=False)
    figure.suptitle(title_of(result), fontsize=10)
    if sweep:
        _sweep(axes[0][0], sweep)
    if fit:
        _fit(axes[0][-1], fit)
    return _save(figure, path)


def _throughput(ax: Axes, arms: dict[str, Any], reference: str) -> None:
    modes = _modes_of(arms)
    width = 0.8 / len(modes)
    for i, mode in enumerate(modes):
        figures = [arm["modes"][mode] for arm in arms.values()]
        places = [x + (i - (len(modes) - 1) / 2) * width for x in range(len(arms))]
        heights = [f["output_tok_per_s"] for f in figures]
        bars = ax.bar(places, heights, width * 0.95, label=mode, color=MODE_COLOURS[mode])
        labels = [f"{f['output_tok_per_s']:.0f}\n({f['ratio']:.2f}x)" for f in figures]
        ax.bar_label(bars, labels, fontsize=8, padding=2)
    ax.set_xticks(range(len(arms)), list(arms))
    ax.margins(y=0.18)
    ax.set_ylabel("output tokens / s")
    ax.set_title(f"Throughput (in brackets: times {reference}, same mode)")
    ax.legend(title="mode", loc="upper left")


def _latency(ax: Axes, arms: dict[str, Any], key: str, title: str) -> None:
    """Bars per arm: p50 full and p99 pale, for each mode. Logarithmic: the modes are far apart."""
    series = [(mode, name, alpha) for mode in _modes_of(arms) for name, alpha in PERCENTILES]
    width = 0.84 / len(series)
    for i, (mode, name, alpha) in enumerate(series):
        heights = [arm["modes"][mode][key][name] or 0 for arm in arms.values()]
        places = [x + (i - (len(series) - 1) / 2) * width for x in range(len(arms))]
        bars = ax.bar(places, heights, width * 0.95, label=f"{mode} {name}", color=MODE_COLOURS[mode], alpha=alpha)
        ax.bar_label(bars, [f"{h:,.0f}" if h >= 10 else f"{h:.2g}" for h in heights], fontsize=7, padding=1)
    ax.set_yscale("log")
    ax.margins(y=0.15)
    ax.set_xticks(range(len(arms)), list(arms))
    ax.set_ylabel("ms (log)")
    ax.set_title(title)
    ax.legend(fontsize=8, ncols=2)


def _utilisation(ax: Axes, arms: dict[str, Any]) -> None:
    """Used over reserved slots against time, in the mode with most requests at once."""
    mode = _modes_of(arms)[-1]
    for name, colour in colours_of(arms).items():
        figures = arms[name]["modes"][mode]
        points = [point for point in figures["kv_series"] if point[3]]
        seconds, shares = [point[0] for point in points], [100 * point[2] / point[3] for point in points]
        mean = figures["kv_utilisation"]
        label = f"{name} (mean {mean:.0%})" if mean is not None else name
        ax.plot(seconds, shares, label=label, color=colour, linewidth=1.6)
    ax.set_ylim(0, 104)
    ax.set_xlim(left=0)
    ax.set_xlabel("seconds since the requests were sent")
    ax.set_ylabel("% of reserved KV slots in use")
    ax.set_title(f"KV cache utilisation ({mode})")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def _sweep(ax: Axes, sweep: dict[str, Any]) -> None:
    for name, colour in colours_of(sweep).items():
        points = sweep[name]
        sizes, speeds = [p["batch_size"] for p in points], [p["output_tok_per_s"] for p in points]
        ax.plot(sizes, speeds, marker="o", label=name, color=colour)
    sizes = [int(p["batch_size"]) for p in next(iter(sweep.values()))]
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel("requests sent at once")
    ax.set_ylabel("output tokens / s")
    ax.set_title("Throughput against batch size")
    ax.grid(alpha=0.3)
    ax.legend()


def _fit(ax: Axes, fit: dict[str, Any]) -> None:
    width = 0.4
    colours = list(MODE_COLOURS.values())
    for i, (key, label) in enumerate((("max_running", "most"), ("mean_running", "mean over steps"))):
        heights = [figures[key] for figures in fit.values()]
        bars = ax.bar(
            [x + (i - 0.5) * width for x in range(len(fit))], heights, width * 0.95, label=label, color=colours[i]
        )
        ax.bar_label(bars, [f"{height:.3g}" for height in heights], fontsize=8, padding=2)
    kv_bytes = max(figures["kv_cache"]["allocated_bytes"] for figures in fit.values())
    ax.set_xticks(range(len(fit)), [f"{name}\n{f['preemptions']:.0f} preempted" for name, f in fit.items()])
    ax.margins(y=0.12)
    ax.set_ylabel("requests")
    ax.set_title(f"Requests running together in {kv_bytes / 2**20:.1f} MiB of KV cache")
    ax.legend()


def title_of(result: dict[str, Any]) -> str:
    machine, run = result["machine"], result["run"]
    git = machine["git"] or {"sha": "unknown", "dirty": False}
    commit = git["sha"][:10] + (" + changes" if git["dirty"] else "")
    return (
        f"{run['model']}, {run['dtype']}, workload {run['workload']['name']}, {machine.get('gpu') or machine['cpu']}, "
        f"{run['threads']} threads, medians of {run['repeats']}\n"
        f"max_model_len {run['max_model_len']}, KV {run['kv_cache_memory'] / 2**20:,.0f} MiB, commit {commit}, "
        f"{result['date'][:10]}"
    )


def _modes_of(arms: dict[str, Any]) -> list[str]:
    return list(next(iter(arms.values()))["modes"])


def colours_of(arms: dict[str, Any]) -> dict[str, str]:
    """The baseline grey, ours in colours that stay the same from plot to plot of one result."""
    ours = [name for name in arms if name != "hf"]
    colours = {name: ARM_COLOURS[i % len(ARM_COLOURS)] for i, name in enumerate(ours)}
    return {name: colours.get(name, BASELINE_GREY) for name in arms}


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return path
