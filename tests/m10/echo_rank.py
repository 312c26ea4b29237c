"""EchoRank: a rank of RayExecutor without a model. What its requests make it do is in tests/m9/echo_worker.py."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.ray import RayExecutor
from folovllm.worker.ray_rank import RayRank
from tests.m9.echo_worker import EchoWorker
from tests.m9.multiproc_helpers import echo_config


class EchoRank(RayRank):
    """The real actor around the echo worker."""

    def make_worker(self, model_path: Path, store: Any) -> EchoWorker:
        with tempfile.TemporaryDirectory() as folder:
            start: Any = SimpleNamespace(rank=self._rank, model_path=model_path, folder=Path(folder))
            return EchoWorker(start)


class RefusingRank(EchoRank):
    """Rank 1 refuses the config, while rank 0 waits for it."""

    def make_worker(self, model_path: Path, store: Any) -> EchoWorker:
        if self._rank == 1:
            raise ValueError("tensor_parallel_size=2 does not suit this model: use 1")
        store.wait(["never set"])
        raise AssertionError


def echo_executor(config: EngineConfig, path: Path) -> RayExecutor:
    return RayExecutor(config, path, EchoRank)


def echo_core(path: Path, **args: Any) -> EngineCore:
    config = echo_config(**args)
    return EngineCore(config, echo_executor(config, path))
