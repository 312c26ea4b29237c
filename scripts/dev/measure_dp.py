#!/usr/bin/env python3
"""Two engines with one thread each against one engine with two threads, on the same cores and the same memory.

Milestone: M10. vLLM counterpart: none.

    python scripts/dev/measure_dp.py                       about 5 minutes on 2 cores
    python scripts/dev/measure_dp.py --rounds 1 --workloads A --num-requests 4 --allow-busy

Three arms: one engine; two engines behind the router by prefix; two engines behind a random router. All are there the
whole time, and an idle engine computes nothing. In each round every workload goes through each arm, in turns, from an
empty prefix cache, through the AsyncLLM of a server. If other programs compute, the script refuses to begin. Writes
milestones/m10/results/dp_cpu.json.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from quiet_machine import QuietMachine

from folovllm.benchmarks.machine import command_line, machine_header, usable_cores
from folovllm.benchmarks.options import positive
from folovllm.benchmarks.report import write_json
from folovllm.benchmarks.runner import say
from folovllm.benchmarks.workloads import BenchRequest, Feed, make_workload
from folovllm.config import DEFAULT_MODEL
from folovllm.engine.async_llm import AsyncLLM
from folovllm.entrypoints.start import start_async_llm
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.utils import percentile

OUTPUT = Path(__file__).resolve().parents[2] / "milestones" / "m10" / "results" / "dp_cpu.json"
WORKLOADS = ("A", "shared-prefix", "multi-turn")
NUM_ENGINES = 2
KV_CACHE_BYTES = 2**30  # of all engines of an arm together
ROUTERS = {"two engines, by prefix": "PrefixRouter", "two engines, at random": "RandomRouter"}
ONE_ENGINE = "one engine"
ARMS = (ONE_ENGINE, *ROUTERS)
Figures = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(argv)
    machine = machine_header()  # first: the load average should not be ours
    quiet = QuietMachine(args.allow_busy)
    start = time.perf_counter()
    runs = asyncio.run(measure(args))
    rows = [
        {"workload": workload, "arm": arm, **summary(runs_of[arm], runs_of[ONE_ENGINE])}
        for workload, runs_of in runs.items()
        for arm in ARMS
    ]
    facts = {"schema": "folovllm.dp/1", "unit": "ms", "date": datetime.now().isoformat(timespec="seconds")}
    facts |= {"command": command_line("scripts/dev/measure_dp.py", argv), "seconds": time.perf_counter() - start}
    write_json({**facts, "machine": machine | quiet.facts(), "results": rows, "runs": runs}, args.output)
    for row in rows:
        speed = f"{row['output_tok_per_s']:8.1f} tok/s  x{row['times_one_engine']}"
        ttft = f"TTFT p50 {row['ttft_p50_ms']:7.0f} ms"
        print(f"{row['workload']:14} {row['arm']:24} {speed}  {ttft}  hits {row['hit_share']:.0%}")
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL)
    add("--dtype", default="bfloat16")
    add("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    add("--rounds", type=positive, default=5)
    add("--num-requests", type=positive, default=None, help="of each workload (default: as the workload has it)")
    add("--allow-busy", action="store_true", help="measure although other programs compute")
    add("--output", type=Path, default=OUTPUT)
    return parser.parse_args(argv)


# ---- the arms


async def start_arm(name: str, args: argparse.Namespace) -> AsyncLLM:
    """Both forms have all cores and the same memory for K/V."""
    if name == ONE_ENGINE:
        shape: dict[str, Any] = {"cpu_threads": usable_cores(), "kv_cache_memory": KV_CACHE_BYTES}
    else:
        shape = {
            "data_parallel_size": NUM_ENGINES,
            "cpu_threads": max(1, usable_cores() // NUM_ENGINES),
            "kv_cache_memory": KV_CACHE_BYTES // NUM_ENGINES,
            "parts": {"serve.router": f"folovllm.engine.router:{ROUTERS[name]}"},
        }
    return await start_async_llm(args.model, dtype=args.dtype, **shape)


async def measure(args: argparse.Namespace) -> dict[str, dict[str, list[Figures]]]:
    """Workload -> arm -> the figures of each round."""
    async with contextlib.AsyncExitStack() as stack:
        arms = {}
        for name in ARMS:
            say(f"[{name}] starts ...")
            arms[name] = await stack.enter_async_context(await start_arm(name, args))
        vocab_size = arms[ONE_ENGINE].config.model_config.arch.vocab_size
        requests = {name: requests_of(name, vocab_size, args.num_requests) for name in args.workloads}
        for engine in arms.values():
            await run(engine, make_workload("smoke", vocab_size).requests * 2, "warm-up")
        runs: dict[str, dict[str, list[Figures]]] = {name: {arm: [] for arm in ARMS} for name in args.workloads}
        for index in range(args.rounds):
            for workload in args.workloads:
                for arm in ARMS[index % 3 :] + ARMS[: index % 3]:
                    figures = await run(arms[arm], requests[workload], f"{workload}-{index}")
                    runs[workload][arm].append(figures)
                    say(f"    round {index + 1}, {workload}, {arm}: {figures['output_tok_per_s']:.1f} tok/s")
        return runs


def requests_of(workload: str, vocab_size: int, count: int | None) -> list[BenchRequest]:
    """All at once. Of shared-prefix two system prompts in turns, so that a router has something to decide."""
    if workload != "shared-prefix":
        return make_workload(workload, vocab_size, count).requests
    requests = make_workload(workload, vocab_size, count, hit_rates=(50, 90)).requests
    half = len(requests) // 2
    return [request for pair in zip(requests[:half], requests[half:], strict=True) for request in pair]


# ---- one run


async def run(engine: AsyncLLM, requests: Sequence[BenchRequest], label: str) -> Figures:
    """Sends the requests as soon as they may be sent, and waits for all answers."""
    await engine.reset_prefix_cache()
    feed, before = Feed(requests), engine.stats
    ttfts: list[float] = []
    start = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:

        async def one(index: int) -> None:
            ttft, token_ids = await answer(engine, feed.complete(index), f"{label}-{index}")
            ttfts.append(ttft)
            feed.answered(index, token_ids)
            send_due()

        def send_due() -> None:
            for index in feed.due():
                tasks.create_task(one(index))

        send_due()
    seconds = time.perf_counter() - start
    await settled(engine)
    after = engine.stats
    queries = after.prefix_cache_queries - before.prefix_cache_queries
    hits = after.prefix_cache_hits - before.prefix_cache_hits
    return {
        "seconds": seconds,
        "output_tok_per_s": sum(request.output_len for request in requests) / seconds,
        "ttft_ms": {f"p{q}": 1e3 * (percentile(ttfts, q) or 0.0) for q in (50, 90)},
        "hit_share": hits / max(queries, 1),
        "output_tokens_by_engine": [
            now.num_generation_tokens - then.num_generation_tokens
            for now, then in zip(after.replicas or (after,), before.replicas or (before,), strict=True)
        ],
    }


async def answer(engine: AsyncLLM, request: BenchRequest, request_id: str) -> tuple[float, list[int]]:
    """The time to the first token, in seconds, and all tokens."""
    params = SamplingParams(
        max_tokens=request.output_len, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    start, first, token_ids = time.perf_counter(), None, list[int]()
    async for output in engine.generate({"prompt_token_ids": request.prompt_token_ids}, params, request_id):
        first = first or time.perf_counter()
        token_ids += output.outputs[0].token_ids
    assert first is not None and len(token_ids) == request.output_len
    return first - start, token_ids


async def settled(engine: AsyncLLM) -> None:
    """Until the statistics of all engines are those of an idle one."""
    while engine.stats.num_running or engine.stats.num_waiting:
        await asyncio.sleep(0.01)


def summary(runs: Sequence[Figures], base: Sequence[Figures]) -> Figures:
    """Medians over the rounds, and the lowest and highest ratio to `base`, the runs of one engine, within a round."""
    ratios = [run["output_tok_per_s"] / one["output_tok_per_s"] for run, one in zip(runs, base, strict=True)]
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return {
        "output_tok_per_s": statistics.median(run["output_tok_per_s"] for run in runs),
        "times_one_engine": low if low == high else f"{low} to {high}",
        "ttft_p50_ms": statistics.median(run["ttft_ms"]["p50"] for run in runs),
        "hit_share": statistics.median(run["hit_share"] for run in runs),
    }


if __name__ == "__main__":
    sys.exit(main())
