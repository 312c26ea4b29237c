"""Draws the pictures of docs/scale.md, docs/scale_replicas.md and docs/learn/10: ranks and links, replicas, a death.

Milestone: M10. vLLM counterpart: none. No torch, no weights, a few seconds:

    python scripts/dev/draw_scale_figures.py [--out docs/learn/img]

The numbers are those of milestones/m10/results/scale_sim.json, which scripts/dev/sim_scale.py writes. The queues of
`10_hot` come from two short simulations, and `10_death` is played on the class that keeps the server's requests.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figure_files
from figure_shapes import CORE, LINE, PALE, TEXT, arrow, box, canvas, cell, note, panel, save
from matplotlib import pyplot as plt

from folovllm import viz
from folovllm.engine.router import PrefixRouter, ReplicaLoad
from folovllm.engine.sent_requests import SentRequests
from folovllm.model_shapes import shape_architecture
from folovllm.outputs import EngineCoreOutput
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.metrics import SLO
from folovllm.sim.simulate import make_simulation
from folovllm.sim.sizing import Sizing
from folovllm.sim.workloads import Recipe, follow_recipe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "milestones/m10/results/scale_sim.json"
BLUE, ORANGE, GREEN = viz.PALETTE[:3]
RED, GREY = "#cf222e", "#8c959f"
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})


def rows_of(table: str, **wanted: Any) -> list[dict[str, Any]]:
    tables = json.loads(RESULTS.read_text(encoding="utf-8"))["tables"]
    return [row for row in tables[table] if all(row[key] == value for key, value in wanted.items())]


def column(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


# ---- docs/scale.md


def tensor_parallel(path: Path) -> None:
    """The time of a decode and of a chunk of a prompt, by the number of GPUs, for each link."""
    rows = rows_of("tp_step", model="llama-3.1-70b")
    sizes = column(rows, "GPUs")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, name, title in zip(
        axes, ("decode", "chunk"), ("16 requests decode", "2,048 tokens of a prompt"), strict=True
    ):
        for link, colour in zip(("NVLink 4", "PCIe 5 x16", "100 GbE"), (GREEN, BLUE, ORANGE), strict=True):
            ax.plot(sizes, column(rows, f"{name}, ms: {link}"), "o-", color=colour, label=link)
        first = rows[0][f"{name}, ms: NVLink 4"]
        ax.plot(sizes, [first / size for size in sizes], ":", color=GREY, label="one GPU's time / GPUs")
        ax.set(title=title, xlabel="GPUs that share the model", xscale="log", yscale="log", ylabel="ms per step")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ticks = [tick for tick in (5, 10, 20, 50, 100, 200, 500, 1_000) if first / 10 < tick < 3 * first]
        ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes[1].legend(frameon=False, fontsize=8.5)
    figure_files.save(figure, path)


def splits(path: Path) -> None:
    """Tokens per second of eight GPUs, divided into engines of 1, 2, 4 and 8, and the gaps that a single user sees."""
    rows = rows_of("splits")
    groups = list(dict.fromkeys((row["model"], row["link"]) for row in rows))
    figure, axes = plt.subplots(1, len(groups), figsize=(9, 3.3), layout="constrained")
    for ax, (model, link) in zip(axes, groups, strict=True):
        chosen = rows_of("splits", model=model, link=link)
        names = [f"{row['engines x GPUs']}\n{row['quiet: ITL p50, ms']:.1f} ms" for row in chosen]
        best = max(column(chosen, "busy: tok/s"))
        colours = [GREEN if row["busy: tok/s"] == best else GREY for row in chosen]
        bars = ax.bar(names, column(chosen, "busy: tok/s"), color=colours)
        ax.bar_label(bars, fmt="{:,.0f}", fontsize=8.5)
        ax.set_title(f"{model}\n{link}", fontsize=10)
        ax.set_ylim(0, 1.12 * max(column(rows_of("splits", model=model), "busy: tok/s")))  # as for the other link
        ax.set_yticks([])
        ax.tick_params(axis="x", labelsize=8.5)
        ax.spines["left"].set_visible(False)
    figure.supxlabel("engines x GPUs each; below, the gap between two tokens of a single user", fontsize=9.5)
    figure.supylabel("tokens per second of 480 questions\nsent at once; one scale per model", fontsize=9.5)
    figure_files.save(figure, path)


# ---- docs/scale_replicas.md


def replicas(path: Path) -> None:
    """Cache hits and the time to the first token, by the number of replicas, for two routers."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    numbers = sorted({row["replicas"] for row in rows_of("replicas")})
    for router, colour in (("prefix", BLUE), ("random", ORANGE)):
        rows = [row for row in rows_of("replicas") if row["router"] == router or row["replicas"] == 1]
        axes[0].plot(column(rows, "replicas"), column(rows, "cache hits, %"), "o-", color=colour, label=router)
        axes[1].plot(column(rows, "replicas"), column(rows, "TTFT p50, ms"), "o-", color=colour, label=f"{router}, p50")
        axes[1].plot(column(rows, "replicas"), column(rows, "TTFT p99, ms"), "o:", color=colour, label=f"{router}, p99")
    for ax, label in zip(axes, ("tokens found in a cache, %", "time to the first token, ms"), strict=True):
        ax.set(xscale="log", xlabel="replicas, each with the same load", ylabel=label, ylim=(0, None))
        ax.set_xticks(numbers, [str(n) for n in numbers])
        ax.minorticks_off()
    axes[0].set_ylim(0, 100)
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    axes[1].set_ylim(0, 1.3 * max(column(rows_of("replicas"), "TTFT p99, ms")))
    axes[1].legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    figure_files.save(figure, path)


def fixed_load(path: Path) -> None:
    """The same load on more and more replicas: what users get, and what a GPU still does."""
    rows = rows_of("fixed_load")
    numbers = column(rows, "replicas")
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.0), layout="constrained")
    for ax, key, colour in zip(
        axes, ("promise kept, %", "ITL p50, ms", "tok/s per GPU"), (GREEN, BLUE, ORANGE), strict=True
    ):
        ax.plot(numbers, column(rows, key), "o-", color=colour)
        ax.set(xscale="log", xlabel="replicas", title=key, ylim=(0, None))
        ax.set_xticks(numbers, [str(n) for n in numbers])
        ax.minorticks_off()
    figure_files.save(figure, path)


# ---- docs/learn/10


def parts(path: Path) -> None:
    """The front end, the client, the router and three engines, and the messages between them."""
    axes = canvas(9, 3.7)
    panel(axes, 0.2, 0.35, 4.5, 3.1, TEXT)
    note(axes, 0.35, 3.25, "front end: one process, one event loop", size=9, color=LINE)
    box(axes, 0.4, 1.9, 1.5, "AsyncLLM", "streams of M8")
    box(axes, 2.55, 1.9, 2.0, "DataParallelClient", "looks like one engine")
    box(axes, 2.55, 0.55, 0.95, "Router", "where?")
    box(axes, 3.6, 0.55, 0.95, "Sent-\nRequests", height=0.62)
    arrow(axes, (1.95, 2.35), (2.5, 2.35))
    arrow(axes, (2.5, 2.05), (1.95, 2.05), BLUE)
    arrow(axes, (3.0, 1.85), (3.0, 1.22))
    arrow(axes, (4.05, 1.85), (4.05, 1.22))
    for y, name in ((2.55, "engine 0"), (1.45, "engine 1"), (0.35, "engine 2")):
        panel(axes, 6.3, y, 2.5, 0.9, CORE, LINE)
        note(axes, 7.55, y + 0.62, name, size=10, weight="bold", ha="center")
        note(axes, 7.55, y + 0.28, "scheduler, KV cache, all weights", size=8.5, color=LINE, ha="center")
        middle = 2.2 + 0.25 * (y - 1.45)  # where the arrows of this engine meet the client
        arrow(axes, (4.62, middle + 0.08), (6.25, y + 0.6))
        arrow(axes, (6.25, y + 0.3), (4.62, middle - 0.08), BLUE)
    note(axes, 4.8, 3.3, "AddRequests,\nAbortRequests, Call", size=8.5, color=LINE)
    note(axes, 5.0, 0.2, "StepOutputs, Dead", size=8.5, color=BLUE)
    save(axes, path)


def route(path: Path) -> None:
    """The example of the page: nine requests, the three replicas after each, and which of them know the prompt."""
    router, counts = PrefixRouter(num_replicas=3, block_size=4, num_blocks=100), [0, 0, 0]
    system = list(range(100, 112))
    ann, answer = [*system, 1, 2, 3, 4], [7] * 5
    requests = [("Ann\nturn 1", ann), ("Bob", list(range(500, 512))), ("Ann\nturn 2", [*ann, *answer, 5, 6, 7])]
    requests += [(f"user {user}", [*system, 50 + user]) for user in range(6)]
    axes = canvas(9, 3.3)
    for replica in range(3):
        note(axes, 0.1, 2.25 - 0.75 * replica, f"replica {replica}", size=10, weight="bold")
    for column, (name, prompt) in enumerate(requests):
        request, x = Request(name, prompt, SamplingParams(max_tokens=8)), 1.1 + 0.87 * column
        loads = [ReplicaLoad(i, count) for i, count in enumerate(counts)]
        place, least = router.route(request, loads), min(counts)
        router.started(request, place)
        counts[place] += 1
        note(axes, x + 0.4, 2.9, name, size=9, ha="center")
        for replica, count in enumerate(counts):
            knows = router.known[replica].match(router.block_names(Request("", system, SamplingParams())))
            left, bottom = x, 1.97 - 0.75 * replica
            panel(axes, left, bottom, 0.8, 0.6, PALE["b"] if knows else TEXT)
            for i in range(count):
                is_new = replica == place and i == count - 1
                cell(axes, left + 0.06 + 0.135 * i, bottom + 0.2, 0.13, 0.2, "", BLUE if is_new else LINE)
            if count - (replica == place) > least + router.max_lead:
                note(axes, left + 0.4, bottom + 0.08, "skipped", size=8, color=RED, ha="center")
        if column == 0:  # it ends before her second turn
            first = request
        if column == 1:
            router.finished(first, 0, answer)
            counts[0] -= 1
    words = "A square: an unfinished request; blue: the one that has just come. Yellow: knows the system prompt."
    note(axes, 0.1, 0.18, words, size=9)
    save(axes, path)


def services(path: Path) -> None:
    """What a router for prefixes and a random one find in the caches, by the number of system prompts."""
    figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
    counts = sorted({row["system prompts"] for row in rows_of("services")})
    for router, colour in (("prefix", BLUE), ("random", ORANGE)):
        rows = rows_of("services", router=router)
        ax.plot(
            column(rows, "system prompts"), column(rows, "cache hits, %"), "o-", color=colour, label=f"{router} router"
        )
    ax.set(xscale="log", xlabel="different system prompts of 4,000 tokens, eight replicas", ylim=(0, 100))
    ax.set_ylabel("tokens found in a cache, %")
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.minorticks_off()
    one_cache = Sizing(shape_architecture("qwen3-8b"), HARDWARE["h100"]).kv_tokens(1) // 4_000
    ax.axvline(one_cache, color=GREY, ls=":")
    ax.text(one_cache, 4, f"{one_cache} fill one cache ", ha="right", fontsize=9, color=GREY)
    ax.legend(frameon=False, loc="center left")
    figure_files.save(figure, path)


def hot(path: Path) -> None:
    """The queues of four replicas over time when most users come with one prefix, with and without a limit."""
    recipe = Recipe("", 60.0, (50, 150), (20, 60), system_prompt=2_000, services=8, hot_share=0.8)
    load = follow_recipe(recipe, "hot", 240)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.1), sharey=True, sharex=True, layout="constrained")
    titles = {"prefix-only": "the longest prefix decides alone", "prefix": "a replica that is over 4 ahead is skipped"}
    for ax, (router, title) in zip(axes, titles.items(), strict=True):
        simulation = make_simulation(load, "qwen3-8b", "h100", data_parallel_size=4, router=router)
        times, counts = [0.0], [[0] * 4]
        for name in ("start", "finish"):
            _record(simulation, name, times, counts)
        simulation.run(SLO())
        for replica, colour in enumerate(viz.PALETTE[:4]):
            ax.step(
                times,
                [count[replica] for count in counts],
                where="post",
                color=colour,
                lw=1.2,
                label=f"replica {replica}",
            )
        ax.set(title=title, xlabel="seconds")
    axes[0].set_ylabel("unfinished requests")
    axes[0].legend(frameon=False, fontsize=9)
    figure_files.save(figure, path)


def _record(simulation: Any, name: str, times: list[float], counts: list[list[int]]) -> None:
    """Notes the loads after each call of a method of the routing."""
    call = getattr(simulation.routing, name)

    def noted(request: Request) -> Any:
        result = call(request)
        times.append(simulation.now)
        counts.append(list(simulation.routing.num_requests))
        return result

    setattr(simulation.routing, name, noted)


def death(path: Path) -> None:
    """Two replicas step by step. Replica 0 dies, and its requests continue in replica 1, one suspect at a time."""
    axes = canvas(9, 3.2)
    requests = SentRequests(2)
    for name, replica in (("a", 0), ("b", 0), ("c", 1)):
        entry = requests.add(Request(name, [1, 2, 3], SamplingParams(max_tokens=LAST_TOKEN), arrival_time=0.0))
        requests.assign(entry, replica)
    running = {0: {"a": 0, "b": 0}, 1: {"c": 0}}
    for replica in (0, 1):
        note(axes, 0.2, 2.35 - 1.35 * replica, f"replica {replica}", size=10, weight="bold")
    for step in range(10):
        x = 1.35 + 0.72 * step
        if step == 3:
            requests.lose(0)
            running[0] = {}
            axes.plot([x - 0.03] * 2, [1.75, 2.95], color=RED, lw=2)
            note(axes, x + 0.08, 2.6, "replica 0 dies; a and b have 3 tokens each", color=RED)
            note(axes, x + 0.08, 2.3, "both are suspects: a goes first, and b waits", color=RED)
            note(axes, x + 0.08, 2.0, "(it is started again, with an empty cache)", color=LINE)
        if step == 4:
            note(axes, x + 0.05, 1.68, "a has a token: acquitted, and b may go", color=viz.PALETTE[0])
        for entry in requests.waiting():
            if requests.places(entry, [1]):
                requests.assign(entry, 1)
                running[1][entry.request.request_id] = len(entry.continuation().output_token_ids)
        for replica, tokens in running.items():
            for name in list(tokens):
                _next_token(axes, x, replica, name, tokens, requests)
    note(axes, 1.35, 0.2, "time: one column per step; a3 is the third token of request a", size=9, color=LINE)
    assert not len(requests), "all answers are complete"
    save(axes, path)


LAST_TOKEN = 7


def _next_token(axes: Any, x: float, replica: int, name: str, tokens: dict[str, int], requests: SentRequests) -> None:
    """The replica computes one more token of a request: it is drawn, and the front end receives it."""
    tokens[name] += 1
    last = tokens[name] == LAST_TOKEN
    requests.receive([EngineCoreOutput(name, [tokens[name]], finish_reason="length" if last else None)])
    row = "abc".index(name)
    cell(axes, x, 2.62 - 1.35 * replica - 0.32 * row, 0.68, 0.28, f"{name}{tokens[name]}", viz.PALETTE[row], "white")
    if last:
        del tokens[name]


SCALE = {
    "scale_tp": tensor_parallel,
    "scale_splits": splits,
    "scale_replicas": replicas,
    "scale_fixed_load": fixed_load,
}
LEARN = {"10_replicas": parts, "10_route": route, "10_services": services, "10_hot": hot, "10_death": death}


def main() -> None:
    parser = figure_files.parser(__doc__ or "")
    out = parser.parse_args().out
    figure_files.draw_all(LEARN, out)
    figure_files.draw_all(SCALE, out.parents[1] / "img" if out == ROOT / "docs/learn/img" else out)


if __name__ == "__main__":
    main()
