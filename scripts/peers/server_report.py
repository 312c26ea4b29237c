"""What a reader sees of compare_servers: one table and one picture.

Milestone: M8. vLLM counterpart: none. No torch.
"""

from pathlib import Path
from typing import Any

from folovllm.benchmarks.machine import commit_of
from folovllm.benchmarks.plot import ARM_COLOURS, BASELINE_GREY, WIDTH, plt, save
from scripts.peers.catalog import OURS

Result = dict[str, Any]
SATURATED = "inf"  # the load that sends everything at once
SHOWN = {
    "median_ttft_ms": "TTFT p50",
    "p99_ttft_ms": "TTFT p99",
    "median_tpot_ms": "TPOT p50",
    "p99_tpot_ms": "TPOT p99",
}
GREYS = ("#7f7f7f", "#b0b0b0", "#d0d0d0")


def headline(result: Result) -> str:
    run, machine = result["run"], result["machine"]
    return (
        f"Servers on {machine['cpu']}, {run['threads']} threads, {run['model']} {run['dtype']}, {run['num_prompts']} "
        f"requests of workload A per load,\nmedian of {run['rounds']} rounds, commit {commit_of(machine)}, "
        f"{result['date'][:10]}; milliseconds, in brackets: times ours"
    )


def load_names(result: Result) -> list[str]:
    return [*(f"{rate:g}" for rate in result["run"]["rates"]), SATURATED]


def server_rows(result: Result) -> list[dict[str, str]]:
    """A row per server and load. In brackets: how many times better ours is."""
    rows = []
    for load in load_names(result):
        for name, server in result["servers"].items():
            if server["rounds"]:
                rows.append(_row(name, server, load))
    return rows


def _row(name: str, server: Result, load: str) -> dict[str, str]:
    found, ratios = server["median"], server["ours_is_better"] or {}

    def cell(key: str, digits: int = 0) -> str:
        value, ratio = found[key], ratios.get(key)
        text = "-" if value is None else f"{value:,.{digits}f}"
        return text if name == OURS or ratio is None else f"{text} ({ratio:.2f}x)"

    return {
        "engine": server["label"],
        "requests/s": "all at once" if load == SATURATED else load,
        **{title: cell(f"{load} {key}", 1 if "tpot" in key else 0) for key, title in SHOWN.items()},
        "tok/s": cell(f"{load} output_throughput"),
        "first token after, s": f"{found['startup_seconds']:.1f}",
        "memory, MiB": f"{found['memory_bytes'] / 2**20:,.0f}",
    }


def problems(result: Result) -> list[str]:
    """Everything that a reader must not miss."""
    lines = [f"{name} failed: {server['error']}" for name, server in result["servers"].items() if server["error"]]
    for name, server in result["servers"].items():
        for one in server["rounds"]:
            lines += [f"{name}, {load}/s: {line}" for load, at in one["loads"].items() for line in at["warnings"]]
    return list(dict.fromkeys(lines))


def write_plot(result: Result, path: Path) -> list[Path]:
    """TTFT and TPOT at each rate (bar to p50, line to p99), throughput, start and memory; nothing without figures."""
    servers = {name: server for name, server in result["servers"].items() if server["rounds"]}
    if not servers:
        return []
    rates = load_names(result)[:-1]
    figure, axes = plt.subplot_mosaic([["ttft"] * 3, ["tpot"] * 3, ["speed", "start", "memory"]], figsize=(WIDTH, 8))
    figure.set_layout_engine("constrained")
    figure.suptitle(headline(result).partition("; ")[0], fontsize=9)
    for kind, title in (("ttft", "Time to first token"), ("tpot", "Time per output token")):
        _latencies(axes[kind], servers, rates, kind)
        axes[kind].set_title(f"{title} at equal request rates: bar to p50, line to p99, ms (log)", fontsize=10)
    axes["ttft"].legend(fontsize=8)
    for key, place, title, unit in (
        (f"{SATURATED} output_throughput", "speed", "All at once, tokens/s", 1),
        ("startup_seconds", "start", "First token after, s", 1),
        ("memory_bytes", "memory", "Resident memory, MiB", 2**20),
    ):
        labels = [server["label"] for server in servers.values()]
        heights = [(server["median"][key] or 0) / unit for server in servers.values()]
        drawn = axes[place].bar(labels, heights, color=_colours(servers))
        axes[place].bar_label(drawn, [f"{height:,.3g}" if height < 100 else f"{height:,.0f}" for height in heights])
        axes[place].set_title(title, fontsize=10)
        axes[place].margins(y=0.15)
    return [save(figure, path)]


def _colours(servers: Result) -> list[str]:
    greys = iter(GREYS)
    return [ARM_COLOURS[0] if name == OURS else next(greys, BASELINE_GREY) for name in servers]


def _latencies(ax: Any, servers: Result, rates: list[str], kind: str) -> None:
    width = 0.8 / len(servers)
    for i, (server, colour) in enumerate(zip(servers.values(), _colours(servers), strict=True)):
        found = server["median"]
        for x, rate in enumerate(rates):
            p50, p99 = (found[f"{rate} {q}_{kind}_ms"] or 0 for q in ("median", "p99"))
            place = x + (i - (len(servers) - 1) / 2) * width
            ax.bar(place, p50, width * 0.9, color=colour, label=server["label"] if x == 0 else None)
            ax.plot([place, place], [p50, p99], color="black", linewidth=1, marker="_")
            ax.annotate(f"{p50:,.0f} / {p99:,.0f}", (place, max(p50, p99)), (0, 3), textcoords="offset points",
                ha="center", fontsize=8)  # fmt: skip
    ax.set_xticks(range(len(rates)), [f"{rate} requests/s" for rate in rates])
    if ax.dataLim.ymax > 0:
        ax.set_yscale("log")
    ax.margins(y=0.2)
