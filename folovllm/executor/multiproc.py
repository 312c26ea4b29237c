"""MultiprocExecutor: one process per rank. Each step is one message to all of them, and one of them answers.

Milestone: M9. vLLM counterpart: vllm/v1/executor/multiproc_executor.py.
Left out: ranks on other machines (RayExecutor has them), answers through shared memory, one thread per call.

All ranks get the same SchedulerOutput, so all of them keep the same state of each request, and their calls of the
communicators meet. The first rank of the last stage answers; the other ranks of its stage have sampled the same tokens.

    core:    execute(a)  execute(b)  sample(a)    execute(c)  sample(b)        two stages, two batches in flight
    stage 0  [ forward a ][ forward b ]           [ forward c ]
    stage 1               [ forward a, sample ]   [ forward b, sample ]

After an error there are two cases. If all ranks are in step, because each of them raised or came to the end, the step
has failed, and the core goes on. Otherwise a rank waits for another one that will not come, and the engine is dead.
"""

import contextlib
import itertools
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.base import Executor
from folovllm.executor.rank_messages import Answer, Ask, Calls, Failed, Step
from folovllm.executor.rank_processes import RankProcesses
from folovllm.outputs import ModelRunnerOutput
from folovllm.parallel import ParallelConfig

START_SECONDS = 1800.0  # to load the model
STEP_SECONDS = 300.0  # for one step
CALL_SECONDS = 300.0  # for another call of the worker, such as the one that takes the memory of the KV cache
SYNC_SECONDS = 5.0  # after an error, beyond the time of the longest step so far
HEALTH_CHECK_SECONDS = 1.0
MAKE_WORKER = "folovllm.worker.worker_process:make_worker"


@dataclass(frozen=True)
class StepHandle:
    """A step between `execute` and `sample`: the number of its message, and when it was sent."""

    number: int
    began: float


class MultiprocExecutor(Executor):
    """Starts the ranks of a resolved config. `worker_factory` replaces the real worker, for tests: "module:function".

    Raises ValueError if a rank refuses the config, and ExecutorDeadError if a rank ends.
    """

    health_check_seconds = HEALTH_CHECK_SECONDS

    def __init__(self, config: EngineConfig, model_path: Path, worker_factory: str = MAKE_WORKER) -> None:
        self._parallel = config.parallel_config
        self._size = self._parallel.world_size
        self._answering_rank = self._size - self._parallel.tensor_parallel_size
        self._numbers = itertools.count(1)  # of messages; number 0 says that a rank is ready
        self._answers: dict[int, dict[int, Answer]] = {0: {}}  # number of a message -> rank -> answer
        self._longest_step = 0.0  # seconds
        self._ranks = RankProcesses(config, model_path, _threads_per_rank(config), worker_factory)
        self._close = weakref.finalize(self, self._ranks.close)
        try:
            self._collect(0, START_SECONDS, f"the ranks were not ready after {START_SECONDS:g} s")
            if config.device == "cpu":
                self._ranks.all_have_met()  # NCCL needs the rendezvous again, when two ranks first talk to each other
        except BaseException:
            self.shutdown()
            raise

    @property
    def process_ids(self) -> list[int]:
        """The processes of the ranks, in order."""
        return self._ranks.process_ids

    # ---- the interface

    def available_kv_cache_bytes(self) -> int:
        """What the rank with the least memory has: all ranks have the same number of blocks."""
        return min(self.collective_rpc("available_kv_cache_bytes"))

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self.collective_rpc("initialize_kv_cache", kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> StepHandle:
        """Sends a step to all ranks. They also sample, so `sample` only waits."""
        handle = StepHandle(next(self._numbers), time.monotonic())
        self._answers[handle.number] = {}
        self._ranks.send(Step(handle.number, scheduler_output), STEP_SECONDS)
        return handle

    def sample(self, handle: StepHandle) -> ModelRunnerOutput:
        """Waits for the answer. Raises what a rank has raised, or ExecutorDeadError."""
        try:
            answer = self._wait_for_step(handle.number)
        finally:
            self._forget(handle.number)
        self._longest_step = max(self._longest_step, time.monotonic() - handle.began)
        return _value(answer)

    def discard(self, handle: StepHandle) -> None:
        """Waits until the step is over, however it ends, unless `sample` has done so."""
        if handle.number in self._answers:
            with contextlib.suppress(Exception):
                self.sample(handle)

    def describe(self) -> dict[str, Any]:
        """What rank 0 runs, and how many ranks there are."""
        parallel = self._parallel
        sizes = f"{parallel.tensor_parallel_size} x {parallel.pipeline_parallel_size}"
        return self.collective_rpc("describe")[0] | {"processes": f"{self._size} (tensor x pipeline parallel: {sizes})"}

    def check_health(self) -> None:
        self._ranks.check()

    def shutdown(self) -> None:
        """Ends the ranks, also in the middle of a step."""
        self._close()

    # ---- answers

    def collective_rpc(
        self, name: str, *args: Any, seconds: float = CALL_SECONDS, too_late: str | None = None
    ) -> list[Any]:
        """Calls a method of the worker in every rank. Returns the answers in the order of the ranks."""
        number = next(self._numbers)
        self._answers[number] = {}
        self._ranks.send(Ask(number, name, args), seconds)
        return self._collect(number, seconds, too_late or f"the ranks have not answered {name}() in {seconds:g} s")

    def _collect(self, number: int, seconds: float, too_late: str) -> list[Any]:
        """Waits until all ranks have answered a message. Raises at once what one of them has raised."""
        deadline, answers = time.monotonic() + seconds, self._answers[number]
        values: dict[int, Any] = {}
        try:
            while len(values) < self._size:
                self._receive(deadline, too_late)
                values = {rank: _value(answer) for rank, answer in answers.items()}
        finally:
            del self._answers[number]
        return [values[rank] for rank in range(self._size)]

    def _receive(self, deadline: float, too_late: str) -> tuple[int, Answer]:
        rank, answer = self._ranks.receive(deadline, too_late)
        if answer.number in self._answers:  # otherwise the step was interrupted, and nothing waits for its answer
            self._answers[answer.number][rank] = answer
        return rank, answer

    def _wait_for_step(self, number: int) -> Answer:
        deadline = time.monotonic() + STEP_SECONDS
        while (answer := self._step_answer(number)) is None:
            rank, latest = self._receive(deadline, f"a step has not ended in {STEP_SECONDS:g} s")
            if isinstance(latest, Failed):
                self._check_in_step(rank, latest)
        return answer

    def _step_answer(self, number: int) -> Answer | None:
        """A step has failed if it has failed in one rank."""
        answers = self._answers[number]
        failures = [answer for answer in answers.values() if isinstance(answer, Failed)]
        return failures[0] if failures else answers.get(self._answering_rank)

    def _check_in_step(self, rank: int, failed: Failed) -> None:
        """Raises ExecutorDeadError if a rank has failed alone: then another one waits for it, or has gone on."""
        error = f"{type(failed.error).__name__}: {failed.error}"
        cause = f"rank {rank} is not in step with the others any more: it raised {error}"
        seconds = SYNC_SECONDS + self._longest_step
        calls = self.collective_rpc("calls", seconds=seconds, too_late=cause)
        calls = self.collective_rpc("catch_up", calls, seconds=seconds, too_late=cause)
        if not in_step(self._parallel, calls):
            self._ranks.die(cause)
            self._ranks.check()

    def _forget(self, number: int) -> None:
        """Nothing waits for this step any more, nor for an older one: its `sample` was never called."""
        for old in [n for n in self._answers if n <= number]:
            del self._answers[old]


def _value(answer: Answer) -> Any:
    if isinstance(answer, Failed):
        raise answer.error
    return answer.value


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


def _threads_per_rank(config: EngineConfig) -> int:
    """`cpu_threads` each, or the threads of this process, divided among the ranks."""
    from folovllm.platforms import default_threads

    return config.cpu_threads or max(1, default_threads().number // config.parallel_config.world_size)
