"""RayRank: the actor of one rank of RayExecutor.

Milestone: M10. vLLM counterpart: RayWorkerWrapper in vllm/executor/ray_utils.py.

The ranks find each other through a store that rank 0 opens on its machine. Ray has reserved a GPU for each of them, and
shows no other one to the process.
"""

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.distributed.ray_cluster import import_ray
from folovllm.outputs import ModelRunnerOutput
from folovllm.worker.rank_worker import Calls, RankWorker
from folovllm.worker.torch_state import neutral_torch

MeetingPoint = tuple[str, int]  # address and port


class RayRank:
    """Made first, so that the ranks can meet; `start` loads the model.

    After a step that raised, a rank computes no further one until it is asked for its `calls`: the other ranks may
    still wait for it in the middle of that step, and must not meet the messages of a later one.
    """

    def __init__(self, config: EngineConfig, rank: int) -> None:
        self._config, self._rank = config, rank
        self._host: str = import_ray("a rank").util.get_node_ip_address()
        self._store: dist.TCPStore | None = None
        parallel = config.parallel_config
        self._answering_rank = parallel.world_size - parallel.tensor_parallel_size  # part 0 of the last stage
        self._failure: Exception | None = None
        self._worker: RankWorker

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
        with self._torch():
            self._worker = RankWorker(self._config, model_path, self._rank, self._store, self._host)

    def available_kv_cache_bytes(self) -> int:
        with self._torch():
            return self._worker.available_kv_cache_bytes()

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        with self._torch():
            self._worker.initialize_kv_cache(kv_cache_config)

    def step(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """Computes a step. All ranks of the last stage sample the same tokens, so one of them returns them."""
        if self._failure is not None:
            raise self._failure
        try:
            with self._torch():
                output = self._worker.step(scheduler_output)
        except Exception as error:
            self._failure = error
            raise
        return output if self._rank == self._answering_rank else None

    def calls(self) -> Calls:
        """What this rank has said to the others since the start. The next step is computed again."""
        self._failure = None
        return self._worker.calls()

    def ping(self) -> int:
        """The id of the process, which shows that it lives."""
        return os.getpid()

    def describe(self) -> dict[str, Any]:
        with self._torch():
            return self._worker.describe()

    def _torch(self) -> Any:
        return neutral_torch(self._config.device, self._config.cpu_threads)
