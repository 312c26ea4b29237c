"""A milestone's bench.toml: the same requests through several engines ("arms"), their counters, and claims about them.

Milestone: M2 (every milestone has one). vLLM counterpart: none. Row 1: no torch.

    bench = load_bench(Path("milestones/m3/bench.toml"))
    arms = run_bench(bench)                            # arm -> metric -> value
    holds("kv_util(m3) > kv_util(m2)", arms)           # claims.py

The scheduler and the KV cache are real. The model is the strict fake one, whose tokens depend on every K and V that it
reads through the block tables. Times are those of the simulator, so they are printed and never claimed.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from folovllm.sim.counting import METRICS, CountingExecutor, counters_of, times_of
from folovllm.sim.metrics import SLO
from folovllm.sim.simulate import make_simulation
from folovllm.sim.workloads import Recipe, SimRequest, SimWorkload, follow_recipe
from folovllm.utils import unknown_name_message

LEDGER = ("hypothesis", "wins", "loses", "control", "trap")


@dataclass(frozen=True)
class Bench:
    """One bench.toml. An arm holds arguments of `make_simulation`, and may change the workload for itself."""

    title: str
    workload: Mapping[str, Any]  # fields of Recipe, and num_requests
    arms: Mapping[str, Mapping[str, Any]]
    metrics: tuple[str, ...]  # the columns of the printed table
    claims: tuple[str, ...]  # "assert" in the file
    ledger: Mapping[str, str]
    measure: tuple[str, ...]  # commands that measure the real engine
    engine: Mapping[str, Any] = field(default_factory=dict)  # what all arms have in common


def load_bench(path: Path) -> Bench:
    """Reads a bench.toml. Raises ValueError that names the file for anything wrong in it."""
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        values["claims"] = values.pop("assert", [])
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        bench = Bench(**values)
        if set(bench.ledger) != set(LEDGER):
            raise ValueError(f"[ledger] must have {', '.join(LEDGER)}")
        if "num_requests" not in bench.workload:
            raise ValueError("[workload] must have num_requests")
        if len(bench.arms) < 2 or not bench.claims:
            raise ValueError("a bench compares at least two arms, and asserts something about them")
        for metric in bench.metrics:
            if metric not in METRICS:
                raise ValueError(unknown_name_message("metric", metric, METRICS))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return bench


def run_bench(bench: Bench) -> dict[str, dict[str, Any]]:
    """Runs every arm. Returns arm -> metric -> value."""
    return {name: _run_arm({**bench.engine, **arm}, bench.workload) for name, arm in bench.arms.items()}


def _run_arm(args: dict[str, Any], workload_args: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {"about": "", "rate": 0.0, **workload_args, **args.pop("workload", {})}
    num_requests = recipe.pop("num_requests")
    tile, recompute = args.pop("tile", None), args.pop("recompute", False)
    workload = follow_recipe(Recipe(**recipe), "bench", num_requests)
    simulation = make_simulation(
        without_cache(workload) if recompute else workload, executor_class=CountingExecutor, **args
    )
    figures = simulation.run(SLO())
    return counters_of(simulation, figures, tile) | times_of(figures)


def without_cache(workload: SimWorkload) -> SimWorkload:
    """The same texts without a KV cache: each token is a request of its own, whose prompt is all that came before."""
    requests: list[SimRequest] = []
    for request in workload.requests:
        assert request.follows is None, "a conversation is a chain already"
        for i in range(request.output_len):
            follows = len(requests) - 1 if i else None
            requests.append(SimRequest(0.0 if i else request.arrival, [] if i else request.prompt, 1, follows))
    return SimWorkload(workload.name, requests, workload.kv_tokens)
