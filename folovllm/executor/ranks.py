"""RanksExecutor: what the executors of a model in several ranks, MultiprocExecutor and RayExecutor, share.

Milestone: M9. vLLM counterpart: the part of vllm/v1/executor/abstract.py that calls all workers (`collective_rpc`).

All ranks get the same SchedulerOutput, so all of them keep the same state of each request, and their calls of the
communicators meet. After an error there are two cases. If all ranks are in step, because each of them raised or came to
the end, the step has failed, and the core goes on. Otherwise a rank waits for another one that will not come, and the
engine is dead.
"""

import contextlib
import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.base import Executor
from folovllm.executor.rank_messages import Calls
from folovllm.outputs import ModelRunnerOutput
from folovllm.parallel import ParallelConfig

START_SECONDS = 1800.0  # to load the model
STEP_SECONDS = 300.0  # for one step
CALL_SECONDS = 300.0  # for another call of the worker, such as the one that takes the memory of the KV cache
SYNC_SECONDS = 5.0  # after an error, beyond the time of the longest step so far


@dataclass
class StepHandle:
    """A step between `execute` and `sample`: what the executor knows it by, and when it was sent."""

    key: Any
    began: float
    is_over: bool = False  # `sample` has taken its answer or its exception


class RanksExecutor(Executor):
    """Sends each step to all ranks, and waits for one answer. Subclasses say how a message and an answer travel."""

    name_of_ranks: ClassVar[str]  # as `describe` calls them

    def __init__(self, config: EngineConfig) -> None:
        self._parallel, self._device = config.parallel_config, config.device
        self._longest_step = 0.0  # seconds

    # ---- how the messages travel

    @abstractmethod
    def collective_rpc(
        self, name: str, *args: Any, seconds: float = CALL_SECONDS, too_late: str | None = None
    ) -> list[Any]:
        """Calls a method in every rank. Returns the answers in the order of the ranks, or raises what a rank raises.

        After `seconds` the engine is dead, and the cause is `too_late`.
        """

    @abstractmethod
    def _start_step(self, scheduler_output: SchedulerOutput) -> Any:
        """Sends a step to all ranks. Returns the key of its handle."""

    @abstractmethod
    def _finish_step(self, key: Any) -> ModelRunnerOutput:
        """Waits for the answer of a step. Raises what a rank has raised, or ExecutorDeadError."""

    @abstractmethod
    def _die(self, cause: str) -> NoReturn:
        """Ends all ranks. From now on every call raises ExecutorDeadError with the cause."""

    # ---- the interface

    def available_kv_cache_bytes(self) -> int:
        """What the rank with the least memory has: all ranks have the same number of blocks."""
        return min(self.collective_rpc("available_kv_cache_bytes"))

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self.collective_rpc("initialize_kv_cache", kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> StepHandle:
        """Sends a step to all ranks. They also sample, so `sample` only waits."""
        began = time.monotonic()
        return StepHandle(self._start_step(scheduler_output), began)

    def sample(self, handle: StepHandle) -> ModelRunnerOutput:
        """Waits for the answer. Raises what a rank has raised, or ExecutorDeadError."""
        handle.is_over = True
        output = self._finish_step(handle.key)
        self._longest_step = max(self._longest_step, time.monotonic() - handle.began)
        return output

    def discard(self, handle: StepHandle) -> None:
        """Waits until the step is over, however it ends, unless `sample` has done so."""
        if not handle.is_over:
            with contextlib.suppress(Exception):
                self.sample(handle)

    def describe(self) -> dict[str, Any]:
        """What rank 0 runs, and how many ranks there are."""
        description: dict[str, Any] = self.collective_rpc("describe")[0]
        return description | {self.name_of_ranks: self._parallel.describe_ranks(self._device)}

    # ---- after an error

    def _check_in_step(self, who: str, error: Exception) -> None:
        """Raises ExecutorDeadError if a rank has failed alone: then another one waits for it, or has gone on."""
        cause = f"{who} is not in step with the others any more: it raised {type(error).__name__}: {error}"
        seconds = SYNC_SECONDS + self._longest_step
        calls = self.collective_rpc("calls", seconds=seconds, too_late=cause)
        calls = self.collective_rpc("catch_up", calls, seconds=seconds, too_late=cause)
        if not in_step(self._parallel, calls):
            self._die(cause)


def in_step(parallel: ParallelConfig, calls: list[Calls]) -> bool:
    """Whether the ranks have made the same calls of their communicators, so that the next ones will meet.

    All ranks of a stage have made the same calls, and each stage has received what the stage before it has sent.
    """
    for rank in range(parallel.world_size):
        shard = parallel.shard(rank)
        if calls[rank]["tp"] != calls[rank - shard.tp_rank]["tp"]:
            return False
        if not shard.is_last_stage:
            next_stage = calls[rank + parallel.tensor_parallel_size]
            if calls[rank]["pp"].get("send", 0) != next_stage["pp"].get("receive", 0):
                return False
    return True
