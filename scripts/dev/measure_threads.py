"""What the threads of the C++ kernels cost, and what they are worth beside other programs.

Milestone: M4. vLLM counterpart: none. Two tables for the pages: the time to hand a job to another thread (from
measure_threads.cpp, which is compiled here together with the thread team, and with OpenMP beside it), and the speed of
the engine with 0, 1 and 2 busy processes, on one thread and on two, with workers that may sit out and that may not.

    python scripts/dev/measure_threads.py [--busy 0,1,2] [--repeats 3] [--json OUT]

The ways to run take turns. A busy process runs in a session of its own, as other programs of a user do.
"""

import argparse
import contextlib
import json
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from folovllm import LLM, SamplingParams
from folovllm.benchmarks.machine import machine_header
from folovllm.benchmarks.options import numbers
from folovllm.benchmarks.report import write_json
from folovllm.csrc.build import SOURCE_DIR, find_compiler, load_ops

PROGRAM = Path(__file__).with_suffix(".cpp")
THREADS = 2
MODES = {"single": (1, 64), "batch": (32, 24)}  # requests, and output tokens of each
WAYS = {"one thread": (1, True), "sits out": (THREADS, True), "takes part": (THREADS, False)}  # (threads, may sit out)
SETTLE_SECONDS = 0.5


def handing_over() -> dict[str, float]:
    """Median nanoseconds from offering a job until both threads have arrived in it."""
    compiler = find_compiler()
    assert compiler is not None, "this measurement needs a C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "measure_threads")
        sources = [str(PROGRAM), str(SOURCE_DIR / "thread_team.cpp")]
        flags = ["-std=c++20", "-O2", "-pthread", "-fopenmp", f"-I{SOURCE_DIR}"]
        subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
        printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    times: dict[str, float] = json.loads(printed)
    return times


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Runs the body beside `count` processes that never sleep."""
    command = [sys.executable, "-I", "-S", "-c", "while True: pass"]
    processes = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        time.sleep(SETTLE_SECONDS if count else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Engine:
    """The default model, one step after another."""

    def __init__(self, model: str) -> None:
        self.llm = LLM(model, enable_prefix_caching=False, max_model_len=1024)
        self.ops = load_ops()
        assert self.ops is not None, "this measurement needs the C++ kernels"
        self.random = random.Random(0)
        self.tokens_per_second(2, 4)

    def tokens_per_second(self, requests: int, length: int) -> float:
        prompts = [[self.random.randrange(1000, 40000) for _ in range(64)] for _ in range(requests)]
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
        begin = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return requests * length / (time.perf_counter() - begin)

    def measure(self, mode: str, way: str) -> dict[str, float]:
        """Output tokens per second, and what the thread team counted meanwhile."""
        threads, may_sit_out = WAYS[way]
        torch.set_num_threads(threads)
        self.ops.disturb_thread_team(0, may_sit_out)
        before = dict(self.ops.thread_team_stats())
        speed = self.tokens_per_second(*MODES[mode])
        return {"output_tok_per_s": speed} | {
            name: count - before[name] for name, count in self.ops.thread_team_stats().items()
        }


def beside_busy_processes(engine: Engine, busy: int, repeats: int) -> list[dict[str, Any]]:
    """One row for each mode and way: the median speed, and the sums of the counts."""
    rows = []
    with busy_processes(busy):
        for mode in MODES:
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(repeats):
                for way in WAYS:
                    runs[way].append(engine.measure(mode, way))
            rows += [row_of(busy, mode, way, runs[way]) for way in WAYS]
    return rows


def row_of(busy: int, mode: str, way: str, runs: list[dict[str, float]]) -> dict[str, Any]:
    threads, may_sit_out = WAYS[way]
    speeds = [run["output_tok_per_s"] for run in runs]
    counts = {name: int(sum(run[name] for run in runs)) for name in runs[0] if name != "output_tok_per_s"}
    row = {"busy": busy, "threads": threads, "sits_out": may_sit_out, "mode": mode}
    row |= {"output_tok_per_s": statistics.median(speeds), "lowest": min(speeds), "highest": max(speeds), **counts}
    print(f"{busy} busy, {mode:6}, {way:10}: {row['output_tok_per_s']:6.1f} tok/s  {counts}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--busy", type=numbers, default=[0, 1, 2], help="e.g. 0,1,2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    command = shlex.join(["scripts/dev/measure_threads.py", *sys.argv[1:]])
    result: dict[str, Any] = {"machine": machine_header(), "command": command, "handing_over_ns": handing_over()}
    print(result["handing_over_ns"])
    engine = Engine(args.model)
    result["results"] = [row for busy in args.busy for row in beside_busy_processes(engine, busy, args.repeats)]
    if args.json is not None:
        write_json(result, args.json)


if __name__ == "__main__":
    main()
