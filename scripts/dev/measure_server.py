#!/usr/bin/env python3
"""What a server costs, in four numbers: start, HTTP's share of the TTFT, throughput beside LLM.generate, memory.

Milestone: M8. vLLM counterpart: none.

    python scripts/dev/measure_server.py                      all four, about 10 minutes on 2 cores
    python scripts/dev/measure_server.py --only throughput    one of start, http_share, throughput, memory

Writes milestones/m8/results/server.json; with --only, the other parts of that file stay. Leave the machine alone.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for scripts.peers

from folovllm.benchmarks.machine import command_line, machine_header, usable_cores
from folovllm.benchmarks.options import positive
from folovllm.benchmarks.report import write_json
from folovllm.benchmarks.runner import answer, ask, say
from folovllm.benchmarks.serve.command import measure
from folovllm.benchmarks.serve.options import ServeOptions
from folovllm.benchmarks.serve.traffic import random_prompts
from folovllm.config import DEFAULT_MODEL
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.tokenizer import Tokenizer
from folovllm.entrypoints.openai_client import OpenAIClient
from folovllm.entrypoints.start import start_async_llm
from folovllm.hub import find_model
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.utils import percentile
from scripts.peers.servers import NAME, Running, Server, ServerTask, free_port, running

OUTPUT = Path(__file__).resolve().parents[2] / "milestones" / "m8" / "results" / "server.json"
CHILD = "--offline-child"
CONCURRENCY = 32
SMALL_POOL = 256 * 2**20  # bytes: soon written in full; what grows after that is a leak
TARGETS = {"start": "under 6 s", "http_share": "p50 under 10 ms", "throughput": "0.9 or more", "memory": "flat"}
Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [CHILD]:
        return answer(Path(argv[1]), Path(argv[2]), run_offline)
    args = parse_args(argv)
    machine = machine_header()  # first: the load average should not be ours
    measures = {"start": start, "http_share": http_share, "throughput": throughput, "memory": memory}
    old = json.loads(args.output.read_text()) if args.only and args.output.exists() else {"parts": {}}
    found = dict(old["parts"])
    for name in args.only or measures:
        say(f"[{name}] ...")
        how = " ".join(str(measures[name].__doc__).split())
        found[name] = {"target": TARGETS[name], "how": how, **measures[name](args), "machine": machine}
        say(f"    {found[name]['value']:.2f} {found[name]['unit']}")
    shown = ("value", "unit", "target")
    rows = [{"what": name.replace("_", " "), **{key: part[key] for key in shown}} for name, part in found.items()]
    facts = {"schema": "folovllm.server/1", "date": datetime.now().isoformat(timespec="seconds")}
    facts |= {"command": command_line("scripts/dev/measure_server.py", argv), "unit": "seconds"}
    write_json({**facts, "machine": machine, "results": rows, "parts": found}, args.output)
    print("\n".join(f"{row['what']:12} {row['value']:10.2f} {row['unit']:24} {row['target']}" for row in rows))
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=list(TARGETS), nargs="+", help="default: all")
    add("--model", default=DEFAULT_MODEL)
    add("--dtype", default="bfloat16")
    add("--rounds", type=positive, default=3, help="of start and throughput (default: 3)")
    add("--pairs", type=positive, default=60, help="of http_share (default: 60)")
    add("--requests", type=positive, default=2000, help="of memory (default: 2000)")
    add("--output", type=Path, default=OUTPUT)
    return parser.parse_args(argv)


@contextmanager
def our_server(args: argparse.Namespace, *options: str) -> Iterator[Running]:
    def arguments(task: ServerTask) -> list[str]:
        name = ("--served-model-name", NAME, "--port", str(task.port), "--dtype", task.dtype)
        return ["-m", "folovllm", "serve", str(task.model), *name, *options]

    task = ServerTask(find_model(args.model, pull=True), sys.executable, args.dtype, usable_cores(), port=free_port())
    with tempfile.TemporaryDirectory(prefix="folovllm-server-") as folder:
        with running(Server("ours", "", "", arguments), task, Path(folder, "log"), timeout=300) as found:
            yield found


def start(args: argparse.Namespace) -> Result:
    """From the start of a fresh process to the first token of its first request; the median of several."""
    seconds = []
    for _ in range(args.rounds):
        with our_server(args) as found:
            seconds.append(found.startup_seconds)
    return {"value": statistics.median(seconds), "unit": "s", "rounds": seconds}


# ---- HTTP's share


def http_share(args: argparse.Namespace) -> Result:
    """The same text, one request at a time, to the server and to AsyncLLM in the client's own process, in turns; the
    difference of the two TTFTs, its median over the pairs."""
    with our_server(args) as found:
        pairs = asyncio.run(measure_pairs(args, found.url))
    served, direct = zip(*pairs[2:], strict=True)  # the first ones warm up
    differences = [1e3 * (a - b) for a, b in zip(served, direct, strict=True)]
    return {
        "value": statistics.median(differences),
        "unit": "ms",
        "difference_ms": {f"p{q}": percentile(differences, q) for q in (10, 50, 90)},
        "served_ttft_ms": {f"p{q}": 1e3 * (percentile(served, q) or 0) for q in (50, 99)},
        "direct_ttft_ms": {f"p{q}": 1e3 * (percentile(direct, q) or 0) for q in (50, 99)},
    }


async def measure_pairs(args: argparse.Namespace, url: str) -> list[tuple[float, float]]:
    """(TTFT through the server, TTFT through AsyncLLM) of the same request, in seconds."""
    tokenizer = Tokenizer.from_folder(find_model(args.model))
    texts = [str(request.prompt) for request in random_prompts(args.pairs + 2, 0, tokenizer, as_text=True)]
    engine = await start_async_llm(args.model, dtype=args.dtype)
    try:
        async with OpenAIClient(url) as client:
            pairs = []
            for index, text in enumerate(texts):
                times = {}
                for side in ("served", "direct") if index % 2 == 0 else ("direct", "served"):
                    ttft = served_ttft(client, text) if side == "served" else direct_ttft(engine, text, index)
                    times[side] = await ttft
                pairs.append((times["served"], times["direct"]))
            return pairs
    finally:
        await engine.shutdown()


async def served_ttft(client: OpenAIClient, text: str) -> float:
    start, first = time.perf_counter(), None
    async for event in client.stream_completion(NAME, text, max_tokens=4, temperature=0.0, ignore_eos=True):
        if first is None and any(choice.get("text") for choice in event["choices"]):
            first = time.perf_counter()
    assert first is not None, "no text came"
    return first - start


async def direct_ttft(engine: AsyncLLM, text: str, index: int) -> float:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    start, first = time.perf_counter(), None
    async for output in engine.generate(text, params, f"direct-{index}"):
        if first is None and output.outputs[0].text:
            first = time.perf_counter()
    assert first is not None, "no text came"
    return first - start


# ---- throughput


def load(url: str, num_prompts: int, seed: int) -> ServeOptions:
    return ServeOptions(url, model=NAME, num_prompts=num_prompts, seed=seed, max_concurrency=CONCURRENCY,
        num_warmups=4, ignore_eos=True, disable_tqdm=True)  # fmt: skip


def clean_figures(options: ServeOptions) -> Result:
    """The figures of a load. A failed request ends the program: there is nothing to compare."""
    result, _ = measure(options)
    for line in result["warnings"]:
        say(f"    warning: {line}")
    if result["figures"]["failed"]:
        raise SystemExit("requests failed; nothing was written")
    return dict(result["figures"])


def throughput(args: argparse.Namespace) -> Result:
    """32 requests of workload A at once, to the server and to LLM.generate in a fresh process, in turns; output tokens
    per second, the ratio within a round, its median over the rounds."""
    rounds: list[dict[str, float]] = []
    with our_server(args) as found:
        for index in range(args.rounds):
            speeds: dict[str, float] = {}
            for side in ("server", "offline") if index % 2 == 0 else ("offline", "server"):
                speeds[side] = served_speed(found.url, index) if side == "server" else offline_speed(args, index)
            say(f"    {speeds}")
            rounds.append(speeds)
    return {"value": statistics.median(r["server"] / r["offline"] for r in rounds), "unit": "of LLM.generate",
        "rounds": rounds}  # fmt: skip


def served_speed(url: str, seed: int) -> float:
    return float(clean_figures(load(url, CONCURRENCY, seed))["output_throughput"])


def offline_speed(args: argparse.Namespace, seed: int) -> float:
    task = json.dumps({"model": args.model, "dtype": args.dtype, "seed": seed})
    result = ask([sys.executable, __file__, CHILD], task, timeout=900, quiet=True)
    if not result["ok"]:
        raise SystemExit(result["error"])
    return float(result["output_tok_per_s"])


def run_offline(task: str) -> Result:
    """In a process of its own: the same requests through LLM.generate."""
    from folovllm import LLM

    given = json.loads(task)
    llm = LLM(given["model"], dtype=given["dtype"])
    requests = random_prompts(CONCURRENCY, given["seed"], llm.get_tokenizer())
    prompts = [{"prompt_token_ids": request.prompt} for request in requests]
    params = [SamplingParams(max_tokens=r.output_len, temperature=0.0, ignore_eos=True) for r in requests]
    warm_up = [{"prompt_token_ids": request.prompt[:64][::-1]} for request in requests[:4]]
    llm.generate(warm_up, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    start = time.perf_counter()
    num_tokens = sum(len(output.outputs[0].token_ids) for output in llm.generate(prompts, params))
    return {"output_tok_per_s": num_tokens / (time.perf_counter() - start)}


# ---- memory


def memory(args: argparse.Namespace) -> Result:
    """32 requests at a time, 16-48 tokens in and 8-24 out, KV cache of 256 MiB; the line of least squares through the
    resident memory of each process, without the first quarter, in which the cache is written for the first time."""
    step, samples = min(100, args.requests // 4), []
    with our_server(args, "--kv-cache-memory", str(SMALL_POOL)) as found:
        for done in range(0, args.requests, step):
            options = replace(load(found.url, step, seed=done), random_input_len=32, random_output_len=16)
            clean_figures(replace(options, random_range_ratio=0.5, num_warmups=0))
            front_end, *engine = found.memory_by_process()
            samples.append((done + step, front_end / 2**20, sum(engine) / 2**20))
            say(f"    {done + step} requests: front end {front_end / 2**20:.1f} MiB, engine {samples[-1][2]:.1f} MiB")
    steady = samples[len(samples) // 4 :]
    moments, *sides = zip(*steady, strict=True)
    slopes = [1e3 * statistics.linear_regression(moments, side).slope for side in sides]
    return {"value": sum(slopes), "unit": "MiB per 1,000 requests", "front_end": slopes[0], "engine": slopes[1],
        "samples": samples}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
