"""Several engines on the fake model behind one AsyncLLM, in threads or processes, and ways to kill one. No weights.

E.g.  async with make_replicas(Replicas(), num_replicas=2) as engine: ...
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.async_llm import AsyncLLM
from folovllm.engine.data_parallel_client import DataParallelClient
from folovllm.engine.start_core import ExecutorFactory
from folovllm.executor.fake import FakeExecutor
from folovllm.outputs import ModelRunnerOutput
from tests.m1.tiny_tokenizers import byte_level
from tests.m8.serving_helpers import TIMEOUT, VOCAB_SIZE, eventually, serving_config


class Killed(BaseException):
    """Comes out of the engine's loop, as a signal does that ends a process."""


class ReplicaExecutor(FakeExecutor):
    """Waits in each step while its gate is closed, and dies in the step after `kill`, or with a poisoned request."""

    def __init__(self, replica: int, poison: Callable[[str], bool]) -> None:
        super().__init__(VOCAB_SIZE)
        self.replica, self._poison = replica, poison
        self.gate = threading.Event()
        self.gate.set()
        self.is_killed = False
        self.num_entered = 0
        self.seconds = 0.0

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        self.num_entered += 1
        assert self.gate.wait(TIMEOUT)
        time.sleep(self.seconds)
        if self.is_killed or any(map(self._poison, handle.num_scheduled_tokens)):
            raise Killed(f"replica {self.replica} was killed")
        return super().sample(handle)


class Replicas:
    """An executor factory that keeps what it made: `now[i]` is the executor of replica i, `made` has all of them."""

    def __init__(self, poison: Callable[[str], bool] = lambda request_id: False, seconds: float = 0.0) -> None:
        self.made: list[ReplicaExecutor] = []
        self.now: dict[int, ReplicaExecutor] = {}
        self.poison, self.seconds = poison, seconds
        self.start_error: Exception | None = None  # raised by the next starts
        self.may_start = threading.Event()
        self.may_start.set()

    def __call__(self, config: EngineConfig) -> ReplicaExecutor:
        assert self.may_start.wait(TIMEOUT)
        if self.start_error is not None:
            raise self.start_error
        executor = ReplicaExecutor(config.parallel_config.data_parallel_rank, self.poison)
        executor.seconds = self.seconds
        self.made.append(executor)
        self.now[executor.replica] = executor
        return executor

    def requests_of(self, replica: int) -> list[str]:
        return list(self.now[replica].requests)

    def open_gates(self) -> None:
        self.may_start.set()
        for executor in self.made:
            executor.gate.set()


@contextlib.asynccontextmanager
async def make_replicas(
    factory: ExecutorFactory,
    num_replicas: int = 2,
    in_process: bool = False,
    heartbeat_timeout: float = TIMEOUT,
    **engine_args: Any,
) -> AsyncIterator[AsyncLLM]:
    """An AsyncLLM with several engines: threads, or processes if `in_process`."""
    config = serving_config(**engine_args)
    parallel = dataclasses.replace(
        config.parallel_config, data_parallel_size=num_replicas, data_parallel_heartbeat_timeout=heartbeat_timeout
    )
    config = dataclasses.replace(config, parallel_config=parallel)
    engine = await AsyncLLM.start(config, Path("unused"), byte_level(), in_process=in_process, executor_factory=factory)
    try:
        yield engine
    finally:
        if isinstance(factory, Replicas):
            factory.open_gates()
        await engine.shutdown()


def client_of(engine: AsyncLLM) -> DataParallelClient:
    assert isinstance(engine._client, DataParallelClient)
    return engine._client


async def kill(engine: AsyncLLM, replicas: Replicas, index: int) -> None:
    """Kills replica `index`, which must have work, and waits until the front end has noticed."""
    executor = replicas.now[index]
    executor.is_killed = True
    executor.gate.set()
    client = client_of(engine).replicas[index].client
    await eventually(
        lambda: not client_of(engine).replicas[index].is_alive or client_of(engine).replicas[index].client is not client
    )


async def all_alive(engine: AsyncLLM) -> None:
    await eventually(lambda: engine.num_alive == engine.num_engines)
