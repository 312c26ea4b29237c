"""Engines that write a trace, healthy and broken ones, for the tests of folovllm.trace. No torch, no weights."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.executor.base import Executor
from folovllm.outputs import ModelRunnerOutput
from folovllm.request import Request
from folovllm.trace.lint import Violation, lint
from folovllm.trace.record import Trace, read_trace
from tests.core_helpers import AttendingExecutor, make_config, make_request

Break = Callable[[EngineCore], None]  # damages an engine before its first step


class CarelessExecutor(Executor):
    """Answers whatever it is asked and notices nothing: with it, only the lint can find a broken scheduler."""

    def available_kv_cache_bytes(self) -> int:
        return 2**40

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        pass

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        return scheduler_output

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        return ModelRunnerOutput({r: [7] if self.samples(r, handle) else [] for r in handle.num_scheduled_tokens})

    def samples(self, request_id: str, handle: SchedulerOutput) -> bool:
        return request_id in handle.sampling_req_ids


def traced_core(path: Path, executor: Executor | None = None, **config_args: Any) -> EngineCore:
    config = dataclasses.replace(make_config(**config_args), trace=str(path))
    return EngineCore(config, executor or AttendingExecutor())


def record_run(core: EngineCore, requests: Iterable[Request], max_steps: int = 60) -> Trace:
    """Run to the end, or for `max_steps` where a broken engine never gets there, and close; the trace."""
    assert core.config.trace is not None
    for request in requests:
        core.add_request(request)
    try:
        for _ in range(max_steps):
            if not core.has_unfinished_requests():
                break
            core.step()
    except (AssertionError, ValueError):
        pass  # the engine noticed by itself, later; the trace up to there must be enough
    core.shutdown()
    return read_trace(core.config.trace)


def six_requests() -> list[Request]:
    """Prompts of 2..12 tokens, together too much for a pool of 12 blocks of 4."""
    lengths = ((7, 6), (2, 9), (12, 4), (5, 5), (3, 8), (9, 3))
    return [make_request(f"r{i}", n, max_tokens, priority=i % 3) for i, (n, max_tokens) in enumerate(lengths)]


def lint_broken(path: Path, damage: Break | None, executor: Executor | None = None, **args: Any) -> list[Violation]:
    """The violations of an engine that `damage` broke."""
    core = traced_core(path, executor or CarelessExecutor(), **args)
    if damage is not None:
        damage(core)
    return lint(record_run(core, six_requests()))
