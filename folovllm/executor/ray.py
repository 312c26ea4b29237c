"""RayExecutor: the ranks of one model as Ray actors, on this machine or on several.

Milestone: M10. vLLM counterpart: vllm/v1/executor/ray_distributed_executor.py, which compiles the calls into a graph.
Left out: compiled graphs, forward and sample as two calls, machines and GPUs chosen by hand.

    execute   the SchedulerOutput goes into Ray's object store once, and every rank gets a reference to it
    sample    waits until all ranks have done the step; one of them answers with the tokens

A rank does its calls one after another, in the order in which they were made, so several steps can be in flight. What
the ranks say to each other within a step does not pass through Ray: torch.distributed connects them directly.

What an error in a rank means is in ranks.py. If a rank has died, the engine is dead, and the cause is kept.
"""

import logging
import time
from pathlib import Path
from typing import Any, NoReturn

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.distributed.ray_cluster import Place, bundle_of, cause_of, import_ray, join_cluster, num_cpus_of
from folovllm.executor.base import ExecutorDeadError
from folovllm.executor.ranks import CALL_SECONDS, START_SECONDS, STEP_SECONDS, RanksExecutor
from folovllm.outputs import ModelRunnerOutput
from folovllm.worker.ray_rank import RayRank

logger = logging.getLogger(__name__)

HEALTH_CHECK_SECONDS = 2.0


class RayExecutor(RanksExecutor):
    """One actor per rank, in places that are reserved together. `config` must be resolved.

    `rank_class` replaces the real rank, for tests. Raises ValueError if Ray is missing, if the cluster has no room, or
    if a rank refuses the config, and ExecutorDeadError if a rank ends.
    """

    health_check_seconds = HEALTH_CHECK_SECONDS
    name_of_ranks = "Ray actors"

    def __init__(self, config: EngineConfig, model_path: Path, rank_class: type[RayRank] = RayRank) -> None:
        self._ray = import_ray("distributed_executor_backend='ray'")
        super().__init__(config)
        self._death: ExecutorDeadError | None = None
        join_cluster(self._parallel.ray_address, num_cpus_of(config))
        self._place = Place(self._ray, [bundle_of(self._ray, config)] * self._parallel.world_size)
        too_late = f"the ranks were not ready after {START_SECONDS:g} s"
        try:
            self._ranks = [
                self._place.start_actor(rank, rank_class, config, rank) for rank in range(self._parallel.world_size)
            ]
            [meeting_point] = self._results([self._ranks[0].meeting_point.remote()], START_SECONDS, too_late)
            self.collective_rpc("start", model_path.absolute(), meeting_point, seconds=START_SECONDS, too_late=too_late)
        except BaseException:
            self.shutdown()
            raise

    # ---- the interface

    def check_health(self) -> None:
        """Raises ExecutorDeadError if a rank has died. The engine asks while it has nothing to compute."""
        self.collective_rpc("ping")

    def shutdown(self) -> None:
        """Ends the ranks, also in the middle of a step."""
        self._place.close()

    # ---- steps

    def _start_step(self, scheduler_output: SchedulerOutput) -> list[Any]:
        """The key of a step is one reference per rank."""
        self._check_alive()
        message = self._ray.put(scheduler_output)
        return [rank.step.remote(message) for rank in self._ranks]

    def _finish_step(self, key: list[Any]) -> ModelRunnerOutput:
        self._check_alive()
        try:
            answers = self._results(key, STEP_SECONDS, f"a step has not ended in {STEP_SECONDS:g} s")
        except ExecutorDeadError:
            raise
        except Exception as error:
            self._check_in_step("a rank", error)
            raise
        answer: ModelRunnerOutput = answers[self._parallel.answering_rank]
        return answer

    # ---- calls of the ranks

    def collective_rpc(
        self, name: str, *args: Any, seconds: float = CALL_SECONDS, too_late: str | None = None
    ) -> list[Any]:
        self._check_alive()
        refs = [getattr(rank, name).remote(*args) for rank in self._ranks]
        return self._results(refs, seconds, too_late or f"the ranks have not answered {name}() in {seconds:g} s")

    def _results(self, refs: list[Any], seconds: float, too_late: str) -> list[Any]:
        """The results of one call per rank. As soon as one has raised, it raises the same.

        Raises ExecutorDeadError if a rank has died, or if there is no answer within `seconds`: see `collective_rpc`.
        """
        deadline = time.monotonic() + seconds
        results: dict[Any, Any] = {}
        while len(results) < len(refs):
            waiting = [ref for ref in refs if ref not in results]
            done, _ = self._ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                self._die(too_late)
            try:
                results[done[0]] = self._ray.get(done[0])
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                self._die(f"rank {refs.index(done[0])}: {cause_of(error)}")
        return [results[ref] for ref in refs]

    def _check_alive(self) -> None:
        if self._death is not None:
            raise ExecutorDeadError(str(self._death))

    def _die(self, cause: str) -> NoReturn:
        logger.error("the ranks are ended: %s", cause)
        self._death = ExecutorDeadError(cause)
        self._place.close()
        raise self._death
