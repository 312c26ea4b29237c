"""Executor: the line between the core, which decides, and the worker, which computes.

Milestone: M1. vLLM counterpart: vllm/v1/executor/abstract.py.

Row 1: no torch. `execute` and `sample` are separate calls, and `execute` answers with a handle: a later milestone can
schedule the next step while this one runs, or hand a grammar's mask over between the two.
"""

from abc import ABC, abstractmethod
from typing import Any

from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.outputs import ModelRunnerOutput

ExecuteHandle = Any  # opaque to the core: whatever the executor needs to find its own step again


class Executor(ABC):
    """Runs steps on one or more workers."""

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

    def describe(self) -> dict[str, Any]:
        """What it runs, as plain data for people to read; nothing if there is nothing to say."""
        return {}

    def shutdown(self) -> None:  # noqa: B027 - most executors hold nothing that needs closing
        """Release what the executor holds."""
