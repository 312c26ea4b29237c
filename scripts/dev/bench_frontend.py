"""What the asynchronous front end costs: the same requests through `LLM.generate`, an engine thread, an engine process.

Milestone: M8. vLLM counterpart: none. 32 requests of workload A (random token ids, forced lengths) are sent at once.
Each run is a process of its own, and the arms take turns, so that the machine's other work hits all of them alike. The
figures of the two asynchronous arms are those of the readers of the streams; LLM's are the engine's time stamps. All
arms must give the same tokens: the results are float32.

    python scripts/dev/bench_frontend.py [--requests 32] [--rounds 5] [--json milestones/m8/results/frontend.json]
"""

import argparse
import asyncio
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from folovllm.benchmarks.machine import command_line, machine_header
from folovllm.benchmarks.report import write_json
from folovllm.benchmarks.workloads import BenchRequest, workload_a
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.utils import percentile

ARMS = ("llm", "thread", "process")
ENGINE_ARGS: dict[str, Any] = {"model": "smollm2-135m", "dtype": "float32", "max_model_len": 1024}
VOCAB_SIZE = 49_152
NUM_WARM_UP = 8
Figures = dict[str, Any]


def params_of(request: BenchRequest, kind: RequestOutputKind) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=request.output_len, output_kind=kind)


def summary(answers: list[list[int]], seconds: float, ttfts: list[float], itls: list[float]) -> Figures:
    return {
        "tok_per_s": sum(map(len, answers)) / seconds,
        "ttft_p50_ms": 1e3 * (percentile(ttfts, 50) or 0.0),
        "itl_p50_ms": 1e3 * (percentile(itls, 50) or 0.0),
        "itl_p99_ms": 1e3 * (percentile(itls, 99) or 0.0),
        "tokens": hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16],
    }


def run_llm(requests: list[BenchRequest]) -> Figures:
    from folovllm import LLM

    llm = LLM(**ENGINE_ARGS)

    def generate(some: list[BenchRequest]) -> list[Any]:
        params = [params_of(request, RequestOutputKind.FINAL_ONLY) for request in some]
        return llm.generate([request.prompt_token_ids for request in some], params, use_tqdm=False)

    generate(requests[:NUM_WARM_UP])
    llm.reset_prefix_cache()
    start = time.monotonic()
    outputs = generate(requests)
    seconds = time.monotonic() - start
    metrics = [output.metrics for output in outputs]
    itls = [latency for one in metrics for latency in one.inter_token_latencies]
    return summary([o.outputs[0].token_ids for o in outputs], seconds, [m.time_to_first_token for m in metrics], itls)


async def run_async(requests: list[BenchRequest], in_process: bool) -> Figures:
    from folovllm import start_async_llm

    ttfts: list[float] = []
    itls: list[float] = []

    async def read(engine: Any, name: str, request: BenchRequest) -> list[int]:
        before, token_ids = time.monotonic(), list[int]()
        stream = engine.generate(request.prompt_token_ids, params_of(request, RequestOutputKind.DELTA), name)
        async for output in stream:
            now = time.monotonic()
            (itls if token_ids else ttfts).append(now - before)
            before = now
            token_ids += output.outputs[0].token_ids
        return token_ids

    async with await start_async_llm(in_process=in_process, **ENGINE_ARGS) as engine:
        await asyncio.gather(*(read(engine, f"w{i}", request) for i, request in enumerate(requests[:NUM_WARM_UP])))
        await engine.reset_prefix_cache()
        ttfts.clear()
        itls.clear()
        start = time.monotonic()
        answers = await asyncio.gather(*(read(engine, f"r{i}", request) for i, request in enumerate(requests)))
        return summary(answers, time.monotonic() - start, ttfts, itls)


def measure(arm: str, num_requests: int) -> Figures:
    """One run of one arm, in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--requests", str(num_requests)]
    result: Figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)  # a child measures this one
    options = parser.parse_args()
    if options.arm is not None:
        requests = workload_a(options.requests, VOCAB_SIZE)
        run = run_llm(requests) if options.arm == "llm" else asyncio.run(run_async(requests, options.arm == "process"))
        print(json.dumps(run))
        return
    machine = machine_header()
    rounds = [{arm: measure(arm, options.requests) for arm in ARMS} for _ in range(options.rounds)]
    if len(digests := {run["tokens"] for one in rounds for run in one.values()}) != 1:
        raise SystemExit(f"the arms gave different tokens: {digests}")
    names = [name for name in rounds[0]["llm"] if name != "tokens"]
    medians = {arm: {name: statistics.median(one[arm][name] for one in rounds) for name in names} for arm in ARMS}
    for arm, figures in medians.items():
        of_llm = statistics.median(one[arm]["tok_per_s"] / one["llm"]["tok_per_s"] for one in rounds)
        figures["throughput_of_llm"] = of_llm
        print(f"{arm:8}", "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    if options.json is not None:
        command = command_line("scripts/dev/bench_frontend.py", sys.argv[1:])
        result = {"schema": "folovllm.frontend.v1", "machine": machine, "command": command}
        write_json(result | {"engine": ENGINE_ARGS, "medians": medians, "rounds": rounds}, options.json)


if __name__ == "__main__":
    main()
