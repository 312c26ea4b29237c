"""How long a step of the scheduler takes, without any model: the time the GPU (or CPU) stands idle between two steps.

Milestone: M2. vLLM counterpart: none (it profiles the whole engine core). Measured with the fake executor, whose own
time is not counted, so the numbers are the core's bookkeeping alone.

Two workloads: "decode", in which every running request gets one token per step and none comes or goes, and "churn", in
which in every step one request finishes and another one takes its place.

    python scripts/dev/bench_scheduler.py [--running 1,8,32] [--waiting 0,10000] [--steps 400] [--json OUT]
"""

import argparse
import dataclasses
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from folovllm.benchmarks.machine import command_line, machine_header
from folovllm.benchmarks.report import write_json
from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.model_shapes import shape_architecture
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

MAX_MODEL_LEN = 4096
BLOCK_SIZE = 16
TARGET_RUNNING, TARGET_SCHEDULE_US, TARGET_STEP_US = 32, 300.0, 600.0


@dataclass(frozen=True)
class Result:
    """Microseconds per step of one workload."""

    workload: str
    running: int
    waiting: int
    schedule_median: float
    schedule_p99: float
    step_median: float  # schedule + update_from_output
    step_p99: float


def make_core(running: int) -> EngineCore:
    """An engine with room for `running` requests of any length, so that nothing is ever preempted."""
    arch = dataclasses.replace(shape_architecture("tiny"), max_position_embeddings=MAX_MODEL_LEN)
    config = EngineConfig(
        model_config=ModelConfig(max_model_len=MAX_MODEL_LEN),
        cache_config=CacheConfig(block_size=BLOCK_SIZE),
        scheduler_config=SchedulerConfig(max_num_seqs=running),
    )
    return EngineCore(config.resolve(arch, "cpu"), FakeExecutor())


def make_request(index: int, prompt_len: int, max_tokens: int) -> Request:
    prompt = [(index * 7 + i) % 500 for i in range(prompt_len)]
    return Request(f"request-{index}", prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def fill(core: EngineCore, running: int, waiting: int, prompt_len: int, churn: bool) -> None:
    """Add the requests and run until all of `running` run. Under churn, one of the first ones ends in every step."""
    endless = MAX_MODEL_LEN - prompt_len
    for i in range(running):
        core.add_request(make_request(i, prompt_len, max_tokens=i + 2 if churn else endless))
    for i in range(running, running + waiting):
        core.add_request(make_request(i, prompt_len, max_tokens=max(running, 2) if churn else endless))
    while core.stats().num_running < running and not churn:
        core.step()


def measure(workload: str, running: int, waiting: int, steps: int, prompt_len: int) -> Result:
    """Time `steps` steps; the executor runs in between and is not timed."""
    churn = workload == "churn"
    core = make_core(running)
    fill(core, running, waiting, prompt_len, churn)
    schedule_us, step_us = [], []
    next_index = running + waiting
    for i in range(-steps // 10, steps):  # the first tenth warms up
        t0 = time.perf_counter()
        scheduler_output = core.scheduler.schedule()
        t1 = time.perf_counter()
        runner_output = core.executor.sample(core.executor.execute(scheduler_output))
        t2 = time.perf_counter()
        outputs = core.scheduler.update_from_output(scheduler_output, runner_output)
        t3 = time.perf_counter()
        if i >= 0:
            schedule_us.append((t1 - t0) * 1e6)
            step_us.append((t1 - t0 + t3 - t2) * 1e6)
        for _ in [output for output in outputs if output.finished]:
            core.add_request(make_request(next_index, prompt_len, max_tokens=max(running, 2)))
            next_index += 1
    assert core.stats().num_running == running or churn, "a decode workload must not lose a request"
    return Result(workload, running, waiting, *summary(schedule_us), *summary(step_us))


def summary(values: list[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    return statistics.median(values), sorted(values)[int(len(values) * 0.99)]


def print_table(results: list[Result]) -> None:
    print(f"{'workload':9} {'running':>7} {'waiting':>7} | {'schedule() us':>19} | {'schedule+update us':>19}")
    print(f"{'':9} {'':>7} {'':>7} | {'median':>9} {'p99':>9} | {'median':>9} {'p99':>9}")
    for r in results:
        print(
            f"{r.workload:9} {r.running:7} {r.waiting:7} | {r.schedule_median:9.1f} {r.schedule_p99:9.1f} "
            f"| {r.step_median:9.1f} {r.step_p99:9.1f}"
        )


def print_verdict(results: list[Result]) -> None:
    """Compare the rows of the target size with the project's limits."""
    rows = [r for r in results if r.running == TARGET_RUNNING]
    if not rows:
        return
    schedule, step = max(r.schedule_median for r in rows), max(r.step_median for r in rows)
    met = schedule < TARGET_SCHEDULE_US and step < TARGET_STEP_US
    print(
        f"worst medians at {TARGET_RUNNING} running: schedule() {schedule:.0f} us (limit {TARGET_SCHEDULE_US:.0f}), "
        f"schedule+update {step:.0f} us (limit {TARGET_STEP_US:.0f}): {'met' if met else 'MISSED'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--running", type=counts, default=[1, 2, 4, 8, 16, 32, 64], help="requests in the batch")
    parser.add_argument("--waiting", type=counts, default=[0, 100, 10_000], help="requests in the queue")
    parser.add_argument("--steps", type=int, default=400, help="timed steps per row")
    parser.add_argument("--prompt-len", type=int, default=100, help="tokens per prompt")
    parser.add_argument("--json", type=Path, default=None, metavar="OUT", help="write machine and results there")
    args = parser.parse_args()
    header = machine_header()  # first: the load average should not be ours
    results = [
        measure(workload, running, waiting, args.steps, args.prompt_len)
        for workload in ("decode", "churn")
        for waiting in args.waiting
        for running in args.running
    ]
    print_table(results)
    print_verdict(results)
    if args.json is not None:
        rows = [dataclasses.asdict(result) for result in results]
        command = command_line("scripts/dev/bench_scheduler.py", without_output(sys.argv[1:]))
        write_json({"machine": header, "command": command, "unit": "us", "results": rows}, args.json)


def counts(text: str) -> list[int]:
    """E.g. "0,100" -> [0, 100]."""
    return [int(part) for part in text.split(",")]


def without_output(argv: list[str]) -> list[str]:
    """The command line without --json and its file, which do not belong into the result."""
    return [a for i, a in enumerate(argv) if a != "--json" and (i == 0 or argv[i - 1] != "--json")]


if __name__ == "__main__":
    main()
