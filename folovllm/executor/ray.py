"""RayExecutor: the ranks of one model as Ray actors, on this machine or on several.

Milestone: M10. vLLM counterpart: vllm/v1/executor/ray_distributed_executor.py, which compiles the calls into a graph.
Left out: compiled graphs, forward and sample as two calls, machines and GPUs chosen by hand.

    execute   the SchedulerOutput goes into Ray's object store once, and every rank gets a reference to it
    sample    waits until all ranks have done the step; one of them answers with the tokens

A rank does its calls one after another, in the order in which they were made, so several steps can be under way. What
the ranks say to each other within a step does not pass through Ray: torch.distributed connects them directly.

If a step raises on all ranks, they stay together and the engine goes on. If it raises on some of them, or if a rank
dies, the others may wait for it in the middle of the step: then the engine is dead, and the cause is kept.
"""

import logging
import time
from pathlib import Path
from typing import Any, NoReturn

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.distributed.ray_cluster import Place, bundle_of, cause_of, import_ray, join_cluster, num_cpus_of
from folovllm.executor.base import Executor, ExecutorDeadError
from folovllm.outputs import ModelRunnerOutput
from folovllm.worker.ray_rank import RayRank

logger = logging.getLogger(__name__)

START_SECONDS = 600.0  # for loading the model
STEP_SECONDS = 300.0  # for a step of all ranks
IN_STEP_SECONDS = 5.0  # after a rank has raised, for the others to end that step too


class RayExecutor(Executor):
    """One actor per rank, in places that are reserved together. `config` must be resolved."""

    health_check_seconds = 2.0

    def __init__(self, config: EngineConfig, model_path: Path, rank_class: type = RayRank) -> None:
        self._ray = import_ray("distributed_executor_backend='ray'")
        parallel = config.parallel_config
        self._last_stage = parallel.world_size - parallel.tensor_parallel_size  # its first rank answers
        self._death: ExecutorDeadError | None = None
        join_cluster(parallel.ray_address, num_cpus_of(config))
        bundle = bundle_of(self._ray, config)
        self._place = Place(self._ray, [bundle] * parallel.world_size)
        try:
            self._ranks = [
                self._place.start_actor(rank, rank_class, config, rank) for rank in range(parallel.world_size)
            ]
            [meeting_point], error = self._gather([self._ranks[0].meeting_point.remote()], START_SECONDS)
            self._call("start", model_path.absolute(), meeting_point)
        except BaseException:
            self.shutdown()
            raise

    def available_kv_cache_bytes(self) -> int:
        return int(min(self._call("available_kv_cache_bytes")))

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self._call("initialize_kv_cache", kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> list[Any]:
        if self._death is not None:
            raise self._death
        message = self._ray.put(scheduler_output)
        return [rank.step.remote(message) for rank in self._ranks]

    def sample(self, handle: list[Any]) -> ModelRunnerOutput:
        results, error = self._gather(handle, STEP_SECONDS)
        if error is not None:
            self._bring_together(handle, error)
            raise error
        answer: ModelRunnerOutput = results[self._last_stage]
        return answer

    def discard(self, handle: list[Any]) -> None:
        """Waits for the end of a step whose answer nothing needs."""
        _, error = self._gather(handle, STEP_SECONDS)
        if error is not None:
            self._bring_together(handle, error)

    def check_health(self) -> None:
        """Raises ExecutorDeadError if a rank has died. The engine asks while it has nothing to compute."""
        self._call("ping")

    def describe(self) -> dict[str, Any]:
        description: dict[str, Any] = self._call("describe")[0]
        return description

    def shutdown(self) -> None:
        self._place.close()

    # ---- calls of the ranks

    def _call(self, name: str, *args: Any) -> list[Any]:
        """Calls a method of all ranks and returns their results. Raises what the first rank raised that did."""
        if self._death is not None:
            raise self._death
        results, error = self._gather([getattr(rank, name).remote(*args) for rank in self._ranks], START_SECONDS)
        if error is not None:
            raise error
        return results

    def _gather(self, refs: list[Any], seconds: float) -> tuple[list[Any], Exception | None]:
        """The results of one call per rank; or, as soon as a call has raised, nothing and what it raised.

        Raises ExecutorDeadError if a rank has died, or if there is no answer within `seconds`.
        """
        deadline = time.monotonic() + seconds
        results: dict[Any, Any] = {}
        while len(results) < len(refs):
            waiting = [ref for ref in refs if ref not in results]
            done, _ = self._ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                self._die(f"a rank has not answered within {seconds:g} s")
            try:
                results[done[0]] = self._ray.get(done[0])
            except self._ray.exceptions.RayTaskError as error:
                return [], error.cause
            except self._ray.exceptions.RayError as error:
                self._die(f"rank {refs.index(done[0])}: {cause_of(error)}")
        return [results[ref] for ref in refs], None

    def _bring_together(self, refs: list[Any], error: Exception) -> None:
        """After a step that raised `error`: lets the ranks go on if they all have ended that step at the same place.

        Otherwise some of them wait for the others, which will never come: ExecutorDeadError.
        """
        done, waiting = self._ray.wait(refs, num_returns=len(refs), timeout=IN_STEP_SECONDS)
        if not waiting:
            calls = self._call("calls")
            if in_step(calls, self._parallel):
                return
        self._die(f"a step raised on some of the ranks only: {type(error).__name__}: {error}")

    def _die(self, cause: str) -> NoReturn:
        """Ends all ranks. From now on every call raises ExecutorDeadError with the cause."""
        logger.error("the ranks are ended: %s", cause)
        self._death = ExecutorDeadError(cause)
        self._place.close()
        raise self._death
