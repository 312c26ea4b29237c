"""Simulates services of 1 to 64 GPUs: tensor parallelism against replicas, routers against each other.

Milestone: M10. vLLM counterpart: none. No torch, no GPU, about five minutes:

    python scripts/dev/sim_scale.py [--only TABLE] [--out milestones/m10/results/scale_sim.json]

Every engine is the real scheduler with the real KV cache, and every router the real one (folovllm/sim). Only times are
modelled, so the file is the same on every machine. docs/scale.md and docs/scale_replicas.md show its tables
(scripts/dev/fill_results.py), and scripts/dev/draw_scale_figures.py draws them.

Each function below makes one table, a list of rows; the keys are the headings of its columns.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folovllm.benchmarks.machine import machine_header
from folovllm.model_shapes import shape_architecture
from folovllm.parallel import ParallelConfig
from folovllm.sim.cost import GPU_CALIBRATION, CostModel
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.links import LINKS
from folovllm.sim.metrics import SLO
from folovllm.sim.simulate import make_simulation, simulate
from folovllm.sim.sizing import Sizing
from folovllm.sim.workloads import Recipe, SimWorkload, follow_recipe
from folovllm.utils import percentile

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "milestones/m10/results/scale_sim.json"
SCHEMA = "folovllm.scale_sim.v1"
Row = dict[str, Any]

SMALL, LARGE, GPU = "qwen3-8b", "llama-3.1-70b", "h100"
SIZES = (1, 2, 4, 8)
PROMISE = SLO(ttft=1.0, itl=0.05)
QUESTIONS = Recipe("questions of users who do not know each other", 1.0, prompt=(200, 1_200), output=(60, 200))
AGENTS = Recipe(
    "tasks of four turns with short answers, each behind one of 16 system prompts", 1.0, prompt=(100, 400),
    output=(20, 40), turns=4, system_prompt=4_000, services=16,
)  # fmt: skip


# ---- one step


def model_of(name: str, tp_size: int, link: str, gpu: str = GPU) -> CostModel:
    parallel = ParallelConfig(tensor_parallel_size=tp_size)
    return CostModel(shape_architecture(name), HARDWARE[gpu], GPU_CALIBRATION, parallel=parallel, link=LINKS[link])


def tp_step() -> list[Row]:
    """The time of one step, by the number of GPUs that share it: a decode of 16 requests, and a chunk of a prompt."""
    works = {"decode": ([(1_000, 1)] * 16, 16), "chunk": ([(0, 2_048)], 1)}
    links = ("nvlink4", "pcie5", "100gbe")
    return [
        {"model": model, "GPUs": size}
        | {
            f"{name}, ms: {LINKS[link].name}": 1e3 * model_of(model, size, link).step(*work).seconds
            for name, work in works.items()
            for link in links
        }
        for model in (SMALL, LARGE)
        for size in SIZES
    ]


def what_fits() -> list[Row]:
    """How many tokens the KV cache of one engine holds, by the number of GPUs that share the model."""
    rows = []
    for model, gpu in ((SMALL, "l4"), (SMALL, "h100"), (LARGE, "h100"), (LARGE, "h200")):
        sizing = Sizing(shape_architecture(model), HARDWARE[gpu])
        tokens = {size: sizing.kv_tokens(size) for size in SIZES}
        rows.append(
            {"model": model, "GPU": HARDWARE[gpu].name} | {f"tokens on {n}": count for n, count in tokens.items()}
        )
    return rows


# ---- several GPUs, divided in several ways


def measured_way(model: str, num_at_once: int, **args: Any) -> Row:
    """A few users who do not wait for each other, and then many requests that are all there from the beginning."""
    quiet = simulate(questions(40, 0.5), model, GPU, router="least-loaded", **args)
    busy = simulate(questions(num_at_once, 0.0), model, GPU, router="least-loaded", **args)
    return {
        "quiet: TTFT p50, ms": quiet["ttft_ms"]["p50"],
        "quiet: ITL p50, ms": quiet["itl_ms"]["p50"],
        "busy: tok/s": busy["output_tok_per_s"],
        "busy: communication, %": 100 * busy["communication_share"],
        "busy: preemptions": busy["preemptions"],
    }


def questions(count: int, rate: float) -> SimWorkload:
    return follow_recipe(Recipe(**vars(QUESTIONS) | {"rate": rate}), "questions", count)


def splits() -> list[Row]:
    """Eight GPUs as eight, four, two or one engine: how fast a single user is served, and how many tokens all get."""
    rows = []
    for model in (SMALL, LARGE):
        for link in ("nvlink4", "pcie5"):
            for size in SIZES:
                if Sizing(shape_architecture(model), HARDWARE[GPU]).kv_tokens(size) < 4_000:
                    continue  # the weights alone fill these GPUs
                way = measured_way(model, 480, link=link, tensor_parallel_size=size, data_parallel_size=8 // size)
                rows.append({"model": model, "link": LINKS[link].name, "engines x GPUs": f"{8 // size} x {size}"} | way)
    return rows


def stages() -> list[Row]:
    """Sixteen GPUs in two machines with 100 GbE between them: where should the model be cut?"""
    inside, between = {"link": "nvlink4"}, {"stage_link": "100gbe"}
    ways: dict[str, Row] = {
        "1 engine: TP 16 over 100 GbE": {"tensor_parallel_size": 16, "link": "100gbe"},
        "1 engine: TP 8, PP 2 over 100 GbE": {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}
        | inside
        | between,
        "2 engines: TP 8": {"tensor_parallel_size": 8, "data_parallel_size": 2} | inside,
        "4 engines: TP 4": {"tensor_parallel_size": 4, "data_parallel_size": 4} | inside,
    }
    return [{f"{LARGE} on 16 x H100": name} | measured_way(LARGE, 480, **args) for name, args in ways.items()]


# ---- replicas and routers

REPLICAS = (1, 2, 4, 8, 16, 32, 64)
ROUTERS = ("prefix", "random")


def tasks(num_replicas: int, tasks_each: int, rate_each: float, **changes: Any) -> SimWorkload:
    """So many tasks for each replica, and so many that begin per second for each."""
    recipe = Recipe(**vars(AGENTS) | changes | {"rate": rate_each * num_replicas})
    return follow_recipe(recipe, "agents", tasks_each * num_replicas * recipe.turns)


def routed(load: SimWorkload, num_replicas: int, router: str, skip: float = 0.0) -> Row:
    """Figures of the requests without the first `skip` of them (a share): those warm up the caches."""
    simulation = make_simulation(load, SMALL, GPU, router=router, data_parallel_size=num_replicas)
    run = simulation.run(PROMISE)
    served = sorted(simulation.served.values(), key=lambda one: one.arrival)[int(skip * len(load.requests)) :]
    gaps = [gap for one in served for gap in one.gaps]
    return {
        "replicas": num_replicas, "router": router,
        "TTFT p50, ms": 1e3 * (percentile([one.ttft for one in served], 50) or 0.0),
        "TTFT p99, ms": 1e3 * (percentile([one.ttft for one in served], 99) or 0.0),
        "ITL p99, ms": 1e3 * (percentile(gaps, 99) or 0.0),
        "cache hits, %": 100 * sum(one.num_cached_tokens for one in served) / sum(one.prompt_len for one in served),
        "promise kept, %": 100 * sum(one.is_good(PROMISE) for one in served) / len(served),
        "busiest / mean": run["busiest_share"],
    }  # fmt: skip


def replicas() -> list[Row]:
    """1 to 64 replicas, each with the same share of the load: 32 tasks, of which the second half is measured."""
    return [
        routed(tasks(n, 32, 6.0), n, router, skip=0.5)
        for n in REPLICAS
        for router in (ROUTERS if n > 1 else ROUTERS[:1])
    ]


def fixed_load() -> list[Row]:
    """The same load on 1 to 64 replicas: questions, 96 users per second in all."""
    rows = []
    for n in REPLICAS:
        load = questions(576, 96.0)
        run = simulate(load, SMALL, GPU, slo=PROMISE, router="least-loaded", data_parallel_size=n)
        rows.append({
            "replicas": n, "TTFT p99, ms": run["ttft_ms"]["p99"], "ITL p50, ms": run["itl_ms"]["p50"],
            "promise kept, %": 100 * run["good_share"], "tok/s": run["output_tok_per_s"],
            "tok/s per GPU": run["output_tok_per_s"] / n,
        })  # fmt: skip
    return rows


def services() -> list[Row]:
    """Eight replicas, and 1 to 128 different system prompts, after a first half in which the caches become warm."""
    rows = []
    for count in (1, 8, 32, 128):
        load = tasks(8, 2 * max(16, count), 6.0, services=count)
        for router in ROUTERS:
            row = routed(load, 8, router, skip=0.5)
            rows.append({"system prompts": count} | {key: value for key, value in row.items() if key != "replicas"})
    return rows


def hot_prefix() -> list[Row]:
    """Eight replicas, and four of five users come to the same service, for one question each."""
    load = tasks(8, 64, 12.0, hot_share=0.8, turns=1, services=32, output=(50, 150))
    return [routed(load, 8, router) for router in ("prefix-only", "prefix", "least-loaded", "random")]


def nothing_shared() -> list[Row]:
    """Eight replicas, and no two requests begin alike: what does a router for prefixes cost then?"""
    load = questions(384, 96.0)
    return [routed(load, 8, router) for router in ("prefix", "least-loaded", "round-robin", "random")]


TABLES: dict[str, Callable[[], list[Row]]] = {
    make.__name__: make
    for make in (
        tp_step, what_fits, splits, stages, replicas, fixed_load, services, hot_prefix, nothing_shared,
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="TABLE", choices=TABLES, help="make this table, and keep the others")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    old = json.loads(args.out.read_text(encoding="utf-8"))["tables"] if args.only and args.out.exists() else {}
    machine, tables = machine_header(), {}
    for name, make in TABLES.items():
        start = time.perf_counter()
        if args.only in (None, name):
            tables[name] = make()
            print(f"{name}: {len(tables[name])} rows, {time.perf_counter() - start:.0f} s", file=sys.stderr)
        elif name in old:
            tables[name] = old[name]
    result = {"schema": SCHEMA, "machine": machine, "command": "scripts/dev/sim_scale.py", "tables": tables}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
