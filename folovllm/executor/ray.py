"""RayExecutor: the ranks of one model as Ray actors, on this machine or on several.

Milestone: M10. vLLM counterpart: vllm/v1/executor/ray_distributed_executor.py, which compiles the calls into a graph.
Left out: compiled graphs, forward and sample as two calls, machines and GPUs chosen by hand.

    execute   the SchedulerOutput goes into Ray's object store once, and every rank gets a reference to it
    sample    waits until all ranks have done the step; one of them answers with the tokens

A rank does its calls one after another, in the order in which they were made, so several steps can be in flight. What
the ranks say to each other within a step does not pass through Ray: torch.distributed connects them directly.

What an error means is the same as for MultiprocExecutor: if the ranks are in step after it, the step has failed and the
core goes on; if they are not, or if a rank has died, the engine is dead and the cause is kept.
"""

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.distributed.ray_cluster import Place, bundle_of, cause_of, import_ray, join_cluster, num_cpus_of
from folovllm.executor.base import Executor, ExecutorDeadError
from folovllm.executor.multiproc import CALL_SECONDS, START_SECONDS, STEP_SECONDS, SYNC_SECONDS, in_step
from folovllm.outputs import ModelRunnerOutput
from folovllm.worker.ray_rank import RayRank

logger = logging.getLogger(__name__)

HEALTH_CHECK_SECONDS = 2.0


@dataclass
class StepHandle:
    """A step between `execute` and `sample`: one reference per rank, and when it was sent."""

    refs: list[Any]
    began: float
    is_over: bool = False


class RayExecutor(Executor):
    """One actor per rank, in places that are reserved together. `config` must be resolved.

    `rank_class` replaces the real rank, for tests. Raises ValueError if Ray is missing, if the cluster has no room, or
    if a rank refuses the config, and ExecutorDeadError if a rank ends.
    """

    health_check_seconds = HEALTH_CHECK_SECONDS

    def __init__(self, config: EngineConfig, model_path: Path, rank_class: type[RayRank] = RayRank) -> None:
        self._ray = import_ray("distributed_executor_backend='ray'")
        self._parallel = config.parallel_config
        self._death: ExecutorDeadError | None = None
        self._longest_step = 0.0  # seconds
        join_cluster(self._parallel.ray_address, num_cpus_of(config))
        self._place = Place(self._ray, [bundle_of(self._ray, config)] * self._parallel.world_size)
        try:
            self._ranks = [
                self._place.start_actor(rank, rank_class, config, rank) for rank in range(self._parallel.world_size)
            ]
            [meeting_point] = self._results([self._ranks[0].meeting_point.remote()], START_SECONDS)
            self._call("start", model_path.absolute(), meeting_point, seconds=START_SECONDS)
        except BaseException:
            self.shutdown()
            raise

    # ---- the interface

    def available_kv_cache_bytes(self) -> int:
        """What the rank with the least memory has: all ranks have the same number of blocks."""
        return min(self._call("available_kv_cache_bytes"))

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self._call("initialize_kv_cache", kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> StepHandle:
        """Sends a step to all ranks. They also sample, so `sample` only waits."""
        self._check_alive()
        message = self._ray.put(scheduler_output)
        return StepHandle([rank.step.remote(message) for rank in self._ranks], time.monotonic())

    def sample(self, handle: StepHandle) -> ModelRunnerOutput:
        """Waits for the answer. Raises what a rank has raised, or ExecutorDeadError."""
        self._check_alive()
        handle.is_over = True
        try:
            answers = self._results(handle.refs, STEP_SECONDS)
        except ExecutorDeadError:
            raise
        except Exception as error:
            self._check_in_step(error)
            raise
        self._longest_step = max(self._longest_step, time.monotonic() - handle.began)
        answer: ModelRunnerOutput = answers[self._parallel.world_size - self._parallel.tensor_parallel_size]
        return answer

    def discard(self, handle: StepHandle) -> None:
        """Waits until the step is over, however it ends, unless `sample` has done so."""
        if not handle.is_over:
            with contextlib.suppress(Exception):
                self.sample(handle)

    def describe(self) -> dict[str, Any]:
        """What rank 0 runs, and how many ranks there are."""
        parallel = self._parallel
        sizes = f"{parallel.tensor_parallel_size} x {parallel.pipeline_parallel_size}"
        description: dict[str, Any] = self._call("describe")[0]
        return description | {"Ray actors": f"{parallel.world_size} (tensor x pipeline parallel: {sizes})"}

    def check_health(self) -> None:
        """Raises ExecutorDeadError if a rank has died. The engine asks while it has nothing to compute."""
        self._call("ping")

    def shutdown(self) -> None:
        """Ends the ranks, also in the middle of a step."""
        self._place.close()

    # ---- calls of the ranks

    def _call(self, name: str, *args: Any, seconds: float = CALL_SECONDS) -> list[Any]:
        """Calls a method of all ranks and returns their results. Raises what the first rank raised that did."""
        self._check_alive()
        return self._results([getattr(rank, name).remote(*args) for rank in self._ranks], seconds)

    def _results(self, refs: list[Any], seconds: float) -> list[Any]:
        """The results of one call per rank. As soon as one has raised, it raises the same.

        Raises ExecutorDeadError if a rank has died, or if there is no answer within `seconds`.
        """
        deadline = time.monotonic() + seconds
        results: dict[Any, Any] = {}
        while len(results) < len(refs):
            waiting = [ref for ref in refs if ref not in results]
            done, _ = self._ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                self._die(f"the ranks have not answered within {seconds:g} s")
            try:
                results[done[0]] = self._ray.get(done[0])
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                self._die(f"rank {refs.index(done[0])}: {cause_of(error)}")
        return [results[ref] for ref in refs]

    def _check_in_step(self, error: Exception) -> None:
        """Raises ExecutorDeadError if a rank has failed alone: then another one waits for it, or has gone on."""
        calls = self._all_in_time([rank.calls.remote() for rank in self._ranks])
        if calls is not None:
            calls = self._all_in_time([rank.catch_up.remote(calls) for rank in self._ranks])
        if calls is None or not in_step(self._parallel, calls):
            self._die(f"a rank is not in step with the others any more: it raised {type(error).__name__}: {error}")

    def _all_in_time(self, refs: list[Any]) -> list[Any] | None:
        """The results, or None if a rank has not answered in the time that it may need for a step under way."""
        _, waiting = self._ray.wait(refs, num_returns=len(refs), timeout=SYNC_SECONDS + self._longest_step)
        return None if waiting else self._results(refs, CALL_SECONDS)

    def _check_alive(self) -> None:
        if self._death is not None:
            raise ExecutorDeadError(str(self._death))

    def _die(self, cause: str) -> NoReturn:
        """Ends all ranks. From now on every call raises ExecutorDeadError with the cause."""
        logger.error("the ranks are ended: %s", cause)
        self._death = ExecutorDeadError(cause)
        self._place.close()
        raise self._death
