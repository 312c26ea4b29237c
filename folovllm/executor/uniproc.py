"""UniProcExecutor: one worker in this process.

Milestone: M1. vLLM counterpart: vllm/executor/uniproc_executor.py.
"""

from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.base import Executor
from folovllm.outputs import ModelRunnerOutput
from folovllm.worker.describe import describe_worker
from folovllm.worker.model_runner import ForwardHandle
from folovllm.worker.torch_state import neutral_torch
from folovllm.worker.worker import Worker


class UniProcExecutor(Executor):
    """Calls the worker directly, with the caller's torch settings out of the way."""

    def __init__(self, config: EngineConfig, model_path: Path) -> None:
        self.device_type, self.cpu_threads = config.device, config.cpu_threads
        with neutral_torch(self.device_type, self.cpu_threads):
            self.worker = Worker(config, model_path)

    def available_kv_cache_bytes(self) -> int:
        with neutral_torch(self.device_type, self.cpu_threads):
            return self.worker.available_kv_cache_bytes()

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        with neutral_torch(self.device_type, self.cpu_threads):
            self.worker.initialize_kv_cache(kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> ForwardHandle:
        with neutral_torch(self.device_type, self.cpu_threads):
            return self.worker.execute(scheduler_output)

    def sample(self, handle: ForwardHandle) -> ModelRunnerOutput:
        with neutral_torch(self.device_type, self.cpu_threads):
            return self.worker.sample(handle)

    def describe(self) -> dict[str, Any]:
        return describe_worker(self.worker)
