"""What the trace costs per step: printed (`pytest -s`), and gated only in what a clock cannot blur."""

import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from folovllm.core.kv_cache_utils import make_kv_cache_config
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.trace.header import make_header
from folovllm.trace.recorder import MAX_WAITING_SHOWN
from folovllm.trace.writer import TraceWriter
from tests.core_helpers import make_config, make_request

pytestmark = pytest.mark.m2

RUNNING, STEPS = 32, 200


class TimedTrace(TraceWriter):
    """Measures itself, in processor time: other processes do not count."""

    seconds = 0.0

    def scheduled(self, *args: Any) -> None:
        t0 = time.thread_time()
        super().scheduled(*args)
        self.seconds += time.thread_time() - t0

    def end_step(self, *args: Any) -> None:
        t0 = time.thread_time()
        super().end_step(*args)
        self.seconds += time.thread_time() - t0


def decoding_core(path: Path, prompt_len: int = 100, waiting: int = 0, scheduling_policy: str = "fcfs") -> EngineCore:
    """An engine in which RUNNING requests decode and nobody can join."""
    config = make_config(
        max_model_len=8192, block_size=16, max_num_seqs=RUNNING, max_num_batched_tokens=RUNNING * 8192,
        scheduling_policy=scheduling_policy,
    )  # fmt: skip
    executor = FakeExecutor()
    header = make_header(config, make_kv_cache_config(config, executor.available_bytes))
    core = EngineCore(config, executor, TimedTrace(path, header))
    for i in range(RUNNING + waiting):
        core.add_request(make_request(f"request-{i}", prompt_len, max_tokens=4000))
    core.step()
    return core


@pytest.mark.parametrize(
    ("prompt_len", "waiting", "scheduling_policy"), [(100, 0, "fcfs"), (100, 1000, "priority"), (4000, 0, "fcfs")]
)
def test_cost_of_a_step_is_printed(prompt_len: int, waiting: int, scheduling_policy: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    core = decoding_core(path, prompt_len, waiting, scheduling_policy)
    trace = core.trace
    assert isinstance(trace, TimedTrace)
    costs, bytes_before = [], path.stat().st_size
    for _ in range(STEPS):
        before = trace.seconds
        core.step()
        costs.append((trace.seconds - before) * 1e6)
    core.shutdown()
    print(
        f"\n{RUNNING} decodes of {prompt_len}, {waiting} waiting ({scheduling_policy}): "
        f"mean {statistics.mean(costs):.0f} us, median {statistics.median(costs):.0f} us, max {max(costs):.0f} us, "
        f"{(path.stat().st_size - bytes_before) / STEPS:.0f} bytes per step"
    )
    assert len(path.read_text().splitlines()) == STEPS + 3  # and the header, the prompts' step, the end


def test_bytes_of_a_step_do_not_grow_with_the_queue_or_the_prompts(tmp_path: Path) -> None:
    sizes = set()
    for prompt_len, waiting in ((100, 0), (100, MAX_WAITING_SHOWN + 500), (3892, 0)):
        core = decoding_core(tmp_path / "t.jsonl", prompt_len, waiting)
        assert core.stats().num_waiting == waiting
        core.step()
        core.shutdown()
        *_, decode, _ = (tmp_path / "t.jsonl").read_text().splitlines()
        sizes.add(len(decode) // 100)
    assert max(sizes) - min(sizes) <= 2, "a decode step of the same batch costs the same, give or take a few digits"


def test_nothing_is_written_while_the_engine_is_busy(tmp_path: Path) -> None:
    """Only a full buffer or an idle moment makes the engine wait for the disk."""
    path = tmp_path / "t.jsonl"
    core = decoding_core(path)
    size = path.stat().st_size
    for _ in range(5):
        core.step()
    assert path.stat().st_size == size
    core.abort_requests(list(core.scheduler.requests))
    core.step()
    assert path.stat().st_size > size
