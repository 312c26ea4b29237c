"""Executor: the line between the core, which decides, and the worker, which computes.

Milestone: M1, M9 (several steps in flight). vLLM counterpart: vllm/v1/executor/abstract.py.

Row 1: no torch. `execute` and `sample` are separate calls, and `execute` answers with a handle. So the core can start
a step while earlier ones still run, and a grammar's mask could be handed over between the two calls.

An executor with several steps in flight keeps one promise: every rank runs the steps in the order of the `execute`
calls, each step whole before the next one. KVCacheManager explains what rests on that.
"""

from abc import ABC, abstractmethod
from typing import Any

from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.outputs import ModelRunnerOutput

ExecuteHandle = Any  # opaque to the core: whatever the executor needs to find its own step again


class ExecutorDeadError(RuntimeError):
    """The executor can run no step any more. The text is the cause."""


class Executor(ABC):
    """Runs steps on one or more workers."""

    health_check_seconds: float | None = None  # how often an idle engine calls `check_health`; None: it need not

    @abstractmethod
    def available_kv_cache_bytes(self) -> int:
        """Memory that the KV cache may take."""

    @abstractmethod
    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the cache; called once, before the first step."""

    @abstractmethod
    def execute(self, scheduler_output: SchedulerOutput) -> ExecuteHandle:
        """Start the forward pass of a step."""

    @abstractmethod
    def sample(self, handle: ExecuteHandle) -> ModelRunnerOutput:
        """Sample the next tokens of the step behind `handle`."""

    def discard(self, handle: ExecuteHandle) -> None:  # noqa: B027 - nothing is on its way in most executors
        """Waits until the step behind `handle` has ended and drops its answer. A no-op if the answer was taken.

        After an exception the core calls it for every step in flight, oldest first, also for the one that raised.
        """

    def describe(self) -> dict[str, Any]:
        """What it runs, as plain data for people to read; nothing if there is nothing to say."""
        return {}

    def check_health(self) -> None:  # noqa: B027 - a worker in this process lives as long as the process
        """Raises ExecutorDeadError if no step can be run any more, e.g. because a worker's process has ended."""

    def shutdown(self) -> None:  # noqa: B027 - most executors hold nothing that needs closing
        """Release what the executor holds."""
