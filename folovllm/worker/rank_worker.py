"""RankWorker: the worker of one of several ranks, with the groups that connect it to the others.

Milestone: M9. vLLM counterpart: init_worker_distributed_environment in vllm/v1/worker/gpu_worker.py. A process of
MultiprocExecutor holds one, and so does an actor of RayExecutor.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.distributed.process_groups import LOOPBACK, make_process_groups
from folovllm.executor.rank_messages import Calls
from folovllm.outputs import ModelRunnerOutput
from folovllm.worker.describe import describe_worker
from folovllm.worker.worker import Worker, rank_device


class RankWorker:
    """Connects `rank` with the others through `store`, and loads its part of the model."""

    def __init__(
        self, config: EngineConfig, model_path: Path, rank: int, store: dist.Store, host: str = LOOPBACK
    ) -> None:
        device = rank_device(config, config.parallel_config.shard(rank))
        self.groups = make_process_groups(config.parallel_config, rank, device, store, host)
        self.worker = Worker(config, model_path, self.groups)

    def available_kv_cache_bytes(self) -> int:
        return self.worker.available_kv_cache_bytes()

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self.worker.initialize_kv_cache(kv_cache_config)

    def step(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        return self.worker.sample(self.worker.execute(scheduler_output))

    def skip(self, scheduler_output: SchedulerOutput) -> None:
        """Computes nothing, because an earlier step has raised here: see `PipelineStage.skip`."""
        stage = self.worker.model_runner.stage
        if stage is not None and not scheduler_output.is_empty:
            stage.skip(scheduler_output.total_num_scheduled_tokens)

    def catch_up(self, calls: list[Calls]) -> Calls:
        """Takes what the stage before has sent in skipped steps. `calls` are those of all ranks."""
        stage, shard = self.worker.model_runner.stage, self.groups.shard
        if stage is not None and not shard.is_first_stage:
            stage.catch_up(calls[shard.rank - shard.tp_size]["pp"].get("send", 0))
        return self.calls()

    def describe(self) -> dict[str, Any]:
        return describe_worker(self.worker)

    def calls(self) -> Calls:
        """How often this rank has called each operation of its groups: see `in_step` in executor/ranks.py."""
        return {"tp": dict(self.groups.tp.counts.calls), "pp": dict(self.groups.pp.counts.calls)}
