#!/usr/bin/env python3
"""What prefix caching costs when nothing is ever hit: nanoseconds per prompt token, on the core alone.

Milestone: M6. vLLM counterpart: benchmarks/benchmark_prefix_block_hash.py (hashing only). No torch, no model: the fake
executor runs between the timed parts. Every prompt is new, so each one is hashed, looked up in vain and published, and
its blocks throw out those of an earlier one: the pool holds four prompts. What the same prompt costs with caching off
is taken away; the two take turns, prompt by prompt, and medians count.

    add       Request() and add_request: packing and hashing of the prompt's blocks
    schedule  lookup, eviction, publication
    update    the end of the request: its blocks go back to the free queue

Paired runs of the whole engine: `scripts/compare_perf.py --milestones m6,m6-m6` (the prompts of workload A share
nothing).

    python scripts/dev/bench_prefix_cost.py [--lengths 100,500,2000,8000] [--prompts 40] [--json OUT] [--plot OUT.png]
"""

import argparse
import gc
import importlib.util
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.options import numbers
from folovllm.benchmarks.report import write_json
from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.model_shapes import shape_architecture
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

LENGTHS = (100, 250, 500, 1000, 2000, 4000, 8000)
BLOCK_SIZE = 16
PROMPTS_IN_POOL = 4
VOCAB_SIZE = 49_152
LIMIT_NS = 1000.0
WARM_UP = 2 * PROMPTS_IN_POOL  # prompts until the pool is full, and then evicts
PARTS = ("add", "schedule", "update")
Seconds = tuple[float, float, float]  # one per part


@dataclass(frozen=True)
class Variant:
    """A way to cache prefixes."""

    name: str
    cache_args: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Cost over no caching, in nanoseconds per prompt token; `off_ns` is what the core costs without it."""

    variant: str
    prompt_len: int
    cost_ns: float
    add_ns: float
    schedule_ns: float
    update_ns: float
    off_ns: float


OFF = Variant("off", {"enable_prefix_caching": False})


def variants() -> list[Variant]:
    """Both indexes with sha256, and the chain with xxhash where that package is."""
    on = {"enable_prefix_caching": True}
    found = [
        Variant("hash chain, sha256", on | {"prefix_index": "hash", "prefix_caching_hash_algo": "sha256"}),
        Variant("trie", on | {"prefix_index": "trie"}),
    ]
    if importlib.util.find_spec("xxhash") is not None:
        found.insert(1, Variant("hash chain, xxhash", on | {"prefix_caching_hash_algo": "xxhash"}))
    return found


class Core:
    """An engine core on the fake executor, that serves one prompt after another."""

    def __init__(self, variant: Variant, prompt_len: int) -> None:
        max_model_len = prompt_len + BLOCK_SIZE
        num_blocks = 1 + PROMPTS_IN_POOL * -(-max_model_len // BLOCK_SIZE)
        config = EngineConfig(
            model_config=ModelConfig(max_model_len=max_model_len),
            cache_config=CacheConfig(block_size=BLOCK_SIZE, num_kv_blocks=num_blocks, **variant.cache_args),
            scheduler_config=SchedulerConfig(max_num_seqs=1),
        )
        self.core = EngineCore(config.resolve(shape_architecture("smollm2-135m"), "cpu"), FakeExecutor())
        self.num_sent = 0
        self.seconds: list[Seconds] = []

    def serve(self, prompt: list[int]) -> None:
        """One prompt, one token out; notes how long each part took."""
        core, scheduler = self.core, self.core.scheduler
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        t0 = time.perf_counter()
        core.add_request(Request(f"request-{self.num_sent}", prompt, params))
        t1 = time.perf_counter()
        scheduler_output = scheduler.schedule()
        t2 = time.perf_counter()
        runner_output = core.executor.sample(core.executor.execute(scheduler_output))
        t3 = time.perf_counter()
        (output,) = scheduler.update_from_output(scheduler_output, runner_output)
        t4 = time.perf_counter()
        assert output.finished and output.num_cached_tokens <= 0, "a prompt of its own, complete in one step"
        self.num_sent += 1
        self.seconds.append((t1 - t0, t2 - t1, t4 - t3))

    def medians(self) -> Seconds:
        add, schedule, update = (statistics.median(part) for part in zip(*self.seconds, strict=True))
        return add, schedule, update


def measure(prompt_len: int, num_prompts: int, shown: list[Variant]) -> list[Result]:
    """Serve `num_prompts` timed prompts of one length on every variant, in turns."""
    rng = random.Random(prompt_len)
    cores = [Core(variant, prompt_len) for variant in (OFF, *shown)]
    gc.disable()  # a collection would hit one of them at random
    for index in range(WARM_UP + num_prompts):
        prompt = [rng.randrange(VOCAB_SIZE) for _ in range(prompt_len)]
        for core in cores if index % 2 else reversed(cores):
            core.serve(prompt)
    gc.enable()
    for core in cores:
        del core.seconds[:WARM_UP]
    off = cores[0].medians()
    return [result_of(variant, prompt_len, core.medians(), off) for variant, core in zip(shown, cores[1:], strict=True)]


def result_of(variant: Variant, prompt_len: int, on: Seconds, off: Seconds) -> Result:
    add, schedule, update = ((a - b) * 1e9 / prompt_len for a, b in zip(on, off, strict=True))
    return Result(variant.name, prompt_len, add + schedule + update, add, schedule, update, sum(off) * 1e9 / prompt_len)


def print_table(results: list[Result]) -> None:
    print(
        f"{'ns per prompt token':20} {'tokens':>7} {'cost':>8} | {'add':>8} {'schedule':>8} {'update':>8} | {'off':>8}"
    )
    for r in results:
        print(
            f"{r.variant:20} {r.prompt_len:7} {r.cost_ns:8.0f} | {r.add_ns:8.0f} {r.schedule_ns:8.0f} "
            f"{r.update_ns:8.0f} | {r.off_ns:8.0f}"
        )
    worst = max(results, key=lambda r: r.cost_ns)
    verdict = "under" if worst.cost_ns < LIMIT_NS else "OVER"
    print(f"worst: {worst.cost_ns:.0f} ns ({worst.variant}, {worst.prompt_len} tokens): {verdict} {LIMIT_NS:.0f} ns")


def draw(report: dict[str, Any], path: Path) -> None:
    """Cost against length, one line per variant; and where it goes at the longest prompt."""
    from folovllm.benchmarks.plot import plt, save

    results = [Result(**result) for result in report["results"]]
    names = list(dict.fromkeys(r.variant for r in results))
    figure, (lines, parts) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained")
    figure.suptitle(f"Prefix caching at 0% hits, the core alone, blocks of {BLOCK_SIZE}, {report['machine']['cpu']}")
    for name in names:
        points = [(r.prompt_len, r.cost_ns) for r in results if r.variant == name]
        lines.plot(*zip(*points, strict=True), marker="o", label=name)
    lines.axhline(LIMIT_NS, color="grey", linestyle="--", label="the limit set for it")
    lines.set(xscale="log", xlabel="tokens of the prompt", ylabel="ns per prompt token", ylim=(0, None))
    lines.set_title("Hashing, lookup and publication")
    lines.set_xticks([r.prompt_len for r in results], [f"{r.prompt_len:,}" for r in results])
    lines.minorticks_off()
    lines.grid(alpha=0.3)
    lines.legend()
    longest = [r for r in results if r.prompt_len == max(r.prompt_len for r in results)]
    bottoms = [0.0] * len(longest)
    for part in PARTS:
        heights = [max(getattr(r, f"{part}_ns"), 0.0) for r in longest]
        parts.bar(names, heights, bottom=bottoms, label=part)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    parts.set(ylabel="ns per prompt token", title=f"Where it goes, at {longest[0].prompt_len:,} tokens")
    parts.margins(y=0.1)
    parts.legend()
    save(figure, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=numbers, default=LENGTHS, metavar="N,...", help="default: %(default)s")
    parser.add_argument("--prompts", type=int, default=40, metavar="N", help="per length and variant (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write machine and results there")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw them to this PNG")
    args = parser.parse_args(argv)
    machine, now = machine_header(), datetime.now()
    results = [r for length in sorted(args.lengths) for r in measure(length, args.prompts, variants())]
    lengths = ",".join(map(str, args.lengths))
    report = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine,
        "command": f"scripts/dev/bench_prefix_cost.py --lengths {lengths} --prompts {args.prompts}",
        "unit": "ns per prompt token",
        "results": [asdict(result) for result in results],
    }
    print_table(results)
    if args.json:
        write_json(report, args.json)
    if args.plot:
        draw(report, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
