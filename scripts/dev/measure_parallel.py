#!/usr/bin/env python3
"""What several processes cost on one machine: a message, an all-reduce by size, and the engine with its shares.

Milestone: M9. vLLM counterpart: benchmarks/kernels/benchmark_device_communicators.py for the second table.

Groups of two and three ranks take turns, and all engines are started first and then measured in turn, so that a
disturbance of the machine hits all of them. If other programs compute, the script refuses to begin. Writes
milestones/m9/results/parallel_cpu.json, in about four minutes on two cores:

    python scripts/dev/measure_parallel.py [--rounds 5] [--allow-busy]

`results` has the rows of three tables: "round_trip" (execute and sample of a step that computes nothing), "all_reduce"
(its times in rank 0) and "engine". The prompt of an engine is computed in NUM_CHUNKS chunks, so that two stages have
something to do at the same time. A share is that of the calls in the time of the steps, in the rank where it is
largest. It includes the wait for the other ranks, as the microseconds of an all-reduce in the engine do.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from quiet_machine import QuietMachine  # noqa: E402

from folovllm.benchmarks.machine import command_line, machine_header  # noqa: E402
from folovllm.benchmarks.report import write_json  # noqa: E402
from folovllm.config import DEFAULT_MODEL, EngineConfig  # noqa: E402
from folovllm.core.sched.output import SchedulerOutput  # noqa: E402
from folovllm.engine.core import EngineCore  # noqa: E402
from folovllm.executor.rank_messages import StartRank  # noqa: E402
from folovllm.outputs import ModelRunnerOutput  # noqa: E402
from folovllm.parallel import ParallelConfig  # noqa: E402
from folovllm.request import Request  # noqa: E402
from folovllm.sampling_params import SamplingParams  # noqa: E402
from folovllm.utils import percentile  # noqa: E402

RESULT = ROOT / "milestones/m9/results/parallel_cpu.json"
OPERATIONS = ("all_reduce", "all_gather", "send", "receive")
PROMPT, CHUNK, NUM_CHUNKS = 32, 256, 8  # tokens
LONG_PROMPT = NUM_CHUNKS * CHUNK
SIZES = (1, 8, 32, 128, 512, 2048)  # tokens of an all-reduce
FEWEST_CALLS = 300  # of the largest size, in each round
SINGLE, BATCH, BATCH_TOKENS = 48, 16, 24
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arm:
    """An engine to measure. `args` are engine arguments."""

    name: str
    threads_each: int
    args: dict[str, Any]

    @property
    def processes(self) -> int:
        return self.args.get("tensor_parallel_size", 1) * self.args.get("pipeline_parallel_size", 1)


ARMS = (
    Arm("one process, 2 threads", 2, {}),
    Arm("one process, 1 thread", 1, {}),
    Arm("one process, 1 thread, layer by layer", 1, {"decoder_stack": False}),
    Arm("TP 3", 1, {"tensor_parallel_size": 3}),
    Arm("PP 2", 1, {"pipeline_parallel_size": 2}),
)


# ---- in the processes of the ranks


class Probe:
    """A rank without a model: its groups, for all-reduces, and steps that compute nothing."""

    def __init__(self, start: StartRank) -> None:
        import torch
        import torch.distributed as dist

        from folovllm.distributed.process_groups import make_process_groups

        torch.set_num_threads(start.threads)
        parallel = start.config.parallel_config
        store = dist.FileStore(str(start.folder / "store"), parallel.world_size)
        self.groups = make_process_groups(parallel, start.rank, torch.device("cpu"), store)

    def time_all_reduces(self, shape: tuple[int, int], dtype: str, count: int) -> list[float]:
        """Seconds of each call."""
        import torch

        tensor = torch.zeros(shape, dtype=getattr(torch, dtype))  # [num_tokens, hidden_size]
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            self.groups.tp.all_reduce(tensor)
            seconds.append(time.perf_counter() - began)
        return seconds

    def step(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        return ModelRunnerOutput({request_id: [1] for request_id in scheduler_output.num_scheduled_tokens})


def make_probe(start: StartRank) -> Probe:
    return Probe(start)


def make_timed(start: StartRank) -> Any:
    """The real worker, with a clock around its steps and around the calls of its groups."""
    from folovllm.worker.worker_process import make_worker

    worker, seconds, calls = make_worker(start), Counter[str](), Counter[str]()

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **keywords)
            seconds[name] += time.perf_counter() - began  # type: ignore[assignment]
            calls[name] += 1
            return result

        return wrapped

    def take_seconds() -> tuple[dict[str, float], dict[str, int]]:
        taken = dict(seconds), dict(calls)
        seconds.clear(), calls.clear()
        return taken

    for group in (worker.groups.tp, worker.groups.pp):
        for name in OPERATIONS if group.size > 1 else ():
            setattr(group, name, timed(name, getattr(group, name)))
    worker.step = timed("step", worker.step)
    worker.take_seconds = take_seconds
    return worker


# ---- messages and all-reduces


def config_of(arm: Arm, model: str) -> tuple[EngineConfig, Path]:
    """A resolved config, and the folder of the model."""
    from folovllm.engine.start_core import resolve_config
    from folovllm.entrypoints.start import find_model_files

    args: dict[str, Any] = {"max_model_len": LONG_PROMPT + 256, "num_kv_blocks": 256, "enable_prefix_caching": False}
    args |= {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK}
    files = find_model_files(EngineConfig.from_args(model=model, cpu_threads=arm.threads_each, **args | arm.args))
    return resolve_config(files.config, files.arch), files.path


class Times:
    """The seconds of the calls of a group of `ranks`, by the number of tokens; None: of round trips."""

    def __init__(self, ranks: int, model: str, num_calls: int) -> None:
        config, self._path = config_of(Arm("probe", 1, {}), model)
        self._config = dataclasses.replace(config, parallel_config=ParallelConfig(ranks))  # whatever the heads allow
        self.ranks, self._num_calls = ranks, num_calls
        self.seconds: dict[int | None, list[float]] = {size: [] for size in (None, *SIZES)}

    def measure(self) -> None:
        """One round, with new processes. The first tenth of the calls of each size is not counted."""
        from folovllm.executor.multiproc import MultiprocExecutor

        executor = MultiprocExecutor(self._config, self._path, "measure_parallel:make_probe")
        arch, dtype = self._config.model_config.arch, self._config.model_config.dtype
        try:
            for tokens, found in self.seconds.items():
                if tokens is None:
                    count = self._num_calls
                    times = [time_round_trip(executor) for _ in range(count)]
                else:
                    count = max(min(FEWEST_CALLS, self._num_calls), self._num_calls // (1 + tokens // 32))
                    shape = (tokens, arch.hidden_size)
                    times = executor.collective_rpc("time_all_reduces", shape, dtype, count)[0]
                found += times[count // 10 :]
        finally:
            executor.shutdown()

    def rows(self) -> Iterator[Row]:
        arch, dtype = self._config.model_config.arch, self._config.model_config.dtype
        for tokens, seconds in self.seconds.items():
            if tokens is None:
                yield {"table": "round_trip", "ranks": self.ranks, "calls": len(seconds), **microseconds(seconds)}
                continue
            row: Row = {"table": "all_reduce", "ranks": self.ranks, "tokens": tokens, "calls": len(seconds)}
            row["bytes"] = tokens * arch.hidden_size * (4 if dtype == "float32" else 2)
            yield row | microseconds(seconds)


def probe_rows(model: str, rounds: int, num_calls: int) -> Iterator[Row]:
    groups = [Times(ranks, model, num_calls) for ranks in (2, 3)]
    for _ in range(rounds):
        for group in groups:
            group.measure()
    for group in groups:
        yield from group.rows()


def time_round_trip(executor: Any) -> float:
    output = SchedulerOutput([], [], {"0": 1}, 1, frozenset(["0"]), frozenset())
    began = time.perf_counter()
    executor.sample(executor.execute(output))
    return time.perf_counter() - began


def microseconds(seconds: list[float]) -> Row:
    return {f"us_p{q}": round((percentile(seconds, q) or 0.0) * 1e6, 1) for q in (50, 99)}


# ---- engines


class Engine:
    """One arm, started, and its measurements."""

    def __init__(self, arm: Arm, model: str) -> None:
        from folovllm.executor.multiproc import MultiprocExecutor
        from folovllm.executor.uniproc import UniProcExecutor

        self.arm = arm
        config, path = config_of(arm, model)
        self.vocab_size = config.model_config.arch.vocab_size
        self.ranks = MultiprocExecutor(config, path, "measure_parallel:make_timed") if arm.processes > 1 else None
        self.core = EngineCore(config, self.ranks or UniProcExecutor(config, path))
        self.speeds: dict[str, list[float]] = {}
        self.shares: dict[str, list[dict[str, float]]] = {}
        self.all_reduces: dict[str, list[float]] = {}  # mean seconds of a call, in the rank where it is largest

    def measure(self) -> None:
        """One round: one request, a batch, and a long prompt in chunks."""
        self._run("single", 1, PROMPT, SINGLE)
        self._run("batch", BATCH, PROMPT, BATCH_TOKENS)
        self._run("prompt", 1, LONG_PROMPT, 1)

    def _run(self, mode: str, count: int, prompt: int, max_tokens: int) -> None:
        """Tokens per second: those of the prompt if only one is generated, and otherwise those after the first."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for i in range(count):
            prompt_ids = [(7919 * i + 31 * j) % (self.vocab_size - 10) + 5 for j in range(prompt)]
            self.core.add_request(Request(str(i), prompt_ids, params))
        if max_tokens > 1:
            while any(not request.output_token_ids for request in self.core.scheduler.requests.values()):
                self.core.step()
        done = sum(len(request.output_token_ids) for request in self.core.scheduler.requests.values())
        self._take_seconds()
        began = time.perf_counter()
        while self.core.has_unfinished_requests():
            self.core.step()
        tokens = count * prompt if max_tokens == 1 else count * max_tokens - done
        self.speeds.setdefault(mode, []).append(tokens / (time.perf_counter() - began))
        if ranks := self._take_seconds():
            shares = {name: max(rank.get(name, 0.0) / rank["step"] for rank, _ in ranks) for name in OPERATIONS}
            self.shares.setdefault(mode, []).append(shares)
            means = [rank["all_reduce"] / calls["all_reduce"] for rank, calls in ranks if "all_reduce" in calls]
            self.all_reduces.setdefault(mode, []).append(max(means, default=0.0))

    def _take_seconds(self) -> list[tuple[dict[str, float], dict[str, int]]]:
        """Of each rank, since the last time: the seconds and the number of calls of each operation."""
        return [] if self.ranks is None else self.ranks.collective_rpc("take_seconds")

    def row(self) -> Row:
        row: Row = {"table": "engine", "arm": self.arm.name, "processes": self.arm.processes}
        row |= {"threads_each": self.arm.threads_each, "prompt_tokens": LONG_PROMPT, "chunks": NUM_CHUNKS}
        row |= {f"{mode}_tok_per_s": round(statistics.median(found), 1) for mode, found in self.speeds.items()}
        row["all_reduce_share"] = self.share("single", "all_reduce")
        seconds = statistics.median(self.all_reduces.get("single", [0.0]))
        row["all_reduce_us"] = round(seconds * 1e6, 1) if seconds else None
        for mode in self.speeds:
            row[f"{mode}_shares"] = {name: self.share(mode, name) for name in OPERATIONS}
        row["speeds"] = {mode: [round(speed, 1) for speed in found] for mode, found in self.speeds.items()}
        return row

    def share(self, mode: str, operation: str) -> str | None:
        """The median of the rounds. None without other ranks, and for an operation that the arm does not use."""
        found = [shares[operation] for shares in self.shares.get(mode, [])]
        return f"{statistics.median(found):.0%}" if any(found) else None


def engine_rows(model: str, rounds: int, arms: tuple[Arm, ...]) -> Iterator[Row]:
    engines = [Engine(arm, model) for arm in arms]
    try:
        for engine in engines:
            engine.measure()  # to warm up
            engine.speeds.clear(), engine.shares.clear(), engine.all_reduces.clear()
        for i in range(rounds):
            for engine in engines if i % 2 == 0 else reversed(engines):
                engine.measure()
        yield from (engine.row() for engine in engines)
    finally:
        for engine in engines:
            engine.core.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5, help="of each engine, in turn (default: %(default)s)")
    parser.add_argument("--probes", type=int, default=3, help="rounds of each group of ranks (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=2000, help="all-reduces of one token (default: %(default)s)")
    parser.add_argument("--arms", type=int, default=len(ARMS), help="only the first ones, for a rehearsal")
    parser.add_argument("--allow-busy", action="store_true", help="measure although other programs compute")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    machine = machine_header()  # first: the load average should not be ours
    quiet = QuietMachine(args.allow_busy)
    results: list[Row] = []
    for row in probe_rows(args.model, args.probes, args.calls):
        results.append(row)
        print(row, flush=True)
    for row in engine_rows(args.model, args.rounds, ARMS[: args.arms]):
        results.append(row)
        print({key: value for key, value in row.items() if key != "speeds"}, flush=True)
    facts = {"command": command_line("scripts/dev/measure_parallel.py", sys.argv[1:]), "unit": "seconds"}
    facts["rounds"] = args.rounds
    write_json({"machine": machine | quiet.facts(), **facts, "results": results}, args.json)


if __name__ == "__main__":
    main()
