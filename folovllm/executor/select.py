"""make_executor: the executor that `distributed_executor_backend` asks for.

Milestone: M9. vLLM counterpart: Executor.get_class (vllm/v1/executor/abstract.py).
"""

from pathlib import Path

from folovllm.config import EngineConfig
from folovllm.executor.base import Executor


def make_executor(config: EngineConfig, model_path: Path) -> Executor:
    """The executor of a resolved `config`. Raises ValueError if it cannot run here."""
    backend = config.parallel_config.executor_backend
    if backend == "uni":
        from folovllm.executor.uniproc import UniProcExecutor

        return UniProcExecutor(config, model_path)
    if backend == "mp":
        from folovllm.executor.multiproc import MultiprocExecutor

        return MultiprocExecutor(config, model_path)
    assert backend == "ray"
    from folovllm.executor.ray import RayExecutor

    return RayExecutor(config, model_path)
