"""RayRank: the actor of one rank of RayExecutor.

Milestone: M10. vLLM counterpart: RayWorkerWrapper in vllm/executor/ray_utils.py.

The ranks find each other through a store that rank 0 opens on its machine. Ray has reserved a GPU for each of them, and
shows the process no other one.
"""

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.distributed.ray_cluster import import_ray
from folovllm.executor.rank_messages import Calls
from folovllm.outputs import ModelRunnerOutput
from folovllm.parts import load_part
from folovllm.worker.rank_steps import RankSteps
from folovllm.worker.rank_worker import RankWorker

MeetingPoint = tuple[str, int]  # address and port


class RayRank:
    """The actor is made first, so that the ranks can meet. `start` then loads the model."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        for name in config.parts or {}:
            load_part(name, config.parts)  # a class of a learner's file must be loaded before one is unpickled
        self._config, self._rank = config, rank
        self._host: str = import_ray("a rank").util.get_node_ip_address()
        self._store: dist.TCPStore | None = None
        self._worker: Any = None

    def meeting_point(self) -> MeetingPoint:
        """Opens the store of all ranks on a free port of this machine."""
        world_size = self._config.parallel_config.world_size
        self._store = dist.TCPStore(self._host, 0, world_size, is_master=True, wait_for_workers=False)
        return self._host, self._store.port

    def start(self, model_path: Path, meeting_point: MeetingPoint) -> None:
        """Connects this rank with the others, and loads its part of the model."""
        if not model_path.exists():
            raise ValueError(
                f"the machine {self._host} has no folder {model_path}: put the model where all machines of the Ray "
                "cluster have it under the same path"
            )
        if self._store is None:
            self._store = dist.TCPStore(*meeting_point, self._config.parallel_config.world_size, is_master=False)
        self._worker = self.make_worker(model_path, self._store)
        self._steps = RankSteps(self._worker)

    def make_worker(self, model_path: Path, store: dist.Store) -> Any:
        """The real worker; a test double has another one."""
        return RankWorker(self._config, model_path, self._rank, store, self._host)

    def step(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Computes a step. All ranks of the last stage sample the same tokens, and its first rank returns them."""
        output = self._steps.step(scheduler_output)
        return output if self._rank == self._config.parallel_config.answering_rank else None

    def calls(self) -> Calls:
        """See `RankSteps.calls`."""
        return self._steps.calls()

    def catch_up(self, calls: list[Calls]) -> Calls:
        """See `RankWorker.catch_up`."""
        new_calls: Calls = self._worker.catch_up(calls)
        return new_calls

    def ping(self) -> int:
        """The id of the process, which shows that it lives."""
        return os.getpid()

    def available_kv_cache_bytes(self) -> int:
        return int(self._worker.available_kv_cache_bytes())

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self._worker.initialize_kv_cache(kv_cache_config)

    def describe(self) -> dict[str, Any]:
        description: dict[str, Any] = self._worker.describe()
        return description
