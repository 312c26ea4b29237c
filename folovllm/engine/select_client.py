"""make_core_client: the client that `data_parallel_size` and `data_parallel_backend` ask for.

Milestone: M10. vLLM counterpart: `EngineCoreClient.make_async_mp_client` in vllm/v1/engine/core_client.py.

Row 3, without torch.
"""

from dataclasses import replace
from pathlib import Path

from folovllm.config import EngineConfig
from folovllm.engine.core_client import CoreClient, ProcessCoreClient, ThreadCoreClient
from folovllm.engine.data_parallel_client import DataParallelClient
from folovllm.engine.ray_client import RayCoreClient
from folovllm.engine.start_core import ExecutorFactory
from folovllm.parts import load_part


def make_core_client(
    config: EngineConfig, model_path: Path, executor_factory: ExecutorFactory | None = None, in_process: bool = True
) -> CoreClient:
    """The client for `config`, not launched yet. Raises ValueError if there cannot be one.

    Each engine is a process of its own, or with `in_process=False` a thread, or with the backend "ray" an actor.
    """
    parallel = config.parallel_config
    engine_client: type[ProcessCoreClient] | type[ThreadCoreClient] | type[RayCoreClient]
    engine_client = ProcessCoreClient if in_process else ThreadCoreClient
    if parallel.data_parallel_backend == "ray":
        engine_client = RayCoreClient
    if parallel.data_parallel_size == 1:
        return engine_client(config, model_path, executor_factory)
    starts = [0] * parallel.data_parallel_size

    def make_client(replica: int) -> CoreClient:
        starts[replica] += 1
        return engine_client(replica_config(config, replica, starts[replica]), model_path, executor_factory)

    return DataParallelClient(make_client, parallel.data_parallel_size, load_part("serve.router", config.parts))


def replica_config(config: EngineConfig, replica: int, start: int = 1) -> EngineConfig:
    """The config of one replica. Each has a trace file of its own, and a new one if it is started again.

    E.g. replica 1 writes out.1.jsonl instead of out.jsonl, and out.1-2.jsonl after its first death.
    """
    trace = config.trace
    if trace is not None:
        path = Path(trace)
        again = f"-{start}" if start > 1 else ""
        trace = str(path.with_name(f"{path.stem}.{replica}{again}{path.suffix}"))
    parallel = replace(config.parallel_config, data_parallel_rank=replica)
    return replace(config, trace=trace, parallel_config=parallel)
