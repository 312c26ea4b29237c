"""An engine in an actor: it does what an engine in a thread does, and its end is told at once."""

import asyncio
import contextlib
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm import LLM, SamplingParams, start_async_llm
from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.async_llm import AsyncLLM, EngineDeadError
from folovllm.engine.ray_client import RayCoreClient
from folovllm.executor.fake import FakeExecutor
from folovllm.outputs import ModelRunnerOutput
from folovllm.parallel import ParallelConfig
from tests.m1.tiny_tokenizers import byte_level
from tests.m8.serving_helpers import (
    VOCAB_SIZE,
    assert_all_free,
    collect,
    eventually,
    fake_executor,
    greedy,
    oracle,
    prompt_ids,
    run_async,
    serving_config,
)
from tests.m9.parallel_models import make_parallel
from tests.m10.conftest import all_cpus_are_free, is_alive, kill, wait_for

pytestmark = [pytest.mark.m10, pytest.mark.ray]


class SlowExecutor(FakeExecutor):
    """Steps take a while, so that a test can act in the middle of an answer. `pid_file` gets the actor's process."""

    def __init__(self, pid_file: Path, seconds: float = 0.02) -> None:
        super().__init__(VOCAB_SIZE)
        pid_file.write_text(str(os.getpid()))
        self._seconds = seconds

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        time.sleep(self._seconds)
        return super().sample(handle)


class Slow:
    """An executor factory that can be pickled."""

    def __init__(self, pid_file: Path) -> None:
        self.pid_file = pid_file

    def __call__(self, config: EngineConfig) -> SlowExecutor:
        return SlowExecutor(self.pid_file)

    @property
    def pid(self) -> int:
        return int(self.pid_file.read_text())


def refused(config: EngineConfig) -> FakeExecutor:
    raise ValueError("block_size is odd: use an even one")


def broken(config: EngineConfig) -> FakeExecutor:
    raise OSError("no such disk")


def crashing(config: EngineConfig) -> FakeExecutor:
    os._exit(7)


@contextlib.asynccontextmanager
async def engine_in_actor(factory: Callable[[EngineConfig], Any], **engine_args: Any) -> AsyncIterator[AsyncLLM]:
    cpu_threads = engine_args.pop("cpu_threads", None)
    config = dataclasses.replace(serving_config(**engine_args), cpu_threads=cpu_threads)
    client = RayCoreClient(config, Path("unused"), factory)
    client.launch()
    try:
        engine = AsyncLLM(client, await client.ready(), byte_level())
    except BaseException:
        client.close(0.0)
        raise
    try:
        yield engine
    finally:
        await engine.shutdown()


def test_an_actor_does_what_a_thread_does(ray_cluster):
    """Answers, aborts, calls and n > 1."""

    async def run() -> None:
        async with engine_in_actor(fake_executor) as engine:
            prompts = [prompt_ids(i) for i in range(20)]
            streams = [await engine.add_request(f"r{i}", p, greedy()) for i, p in enumerate(prompts)]
            answers = await asyncio.gather(*map(collect, streams))
            assert answers == [oracle(p, 8) for p in prompts]
            several = await engine.add_request("n", prompts[0], greedy(n=3, temperature=1.0))
            assert await collect(several, index=2) == answers[0]
            endless = await engine.add_request("endless", prompts[1], greedy(max_tokens=200))
            engine.abort("endless")
            assert [o.outputs[0].finish_reason async for o in endless][-1] == "abort"
            assert await engine.reset_prefix_cache()
            await assert_all_free(engine)

    run_async(run)


def test_messages_keep_their_order(ray_cluster):
    """The id of an aborted request is free at once: a new request with it must come after the abort."""

    async def run() -> None:
        async with engine_in_actor(fake_executor) as engine:
            for i in range(50):
                await engine.add_request("same", prompt_ids(i), greedy(max_tokens=100))
                engine.abort("same")
            stream = await engine.add_request("same", prompt_ids(99), greedy())
            assert await collect(stream) == oracle(prompt_ids(99), 8)
            await assert_all_free(engine)

    run_async(run)


def test_the_death_of_the_actor_is_told(ray_cluster, tmp_path):
    async def run() -> None:
        slow = Slow(tmp_path / "pid")
        async with engine_in_actor(slow) as engine:
            stream = await engine.add_request("r", prompt_ids(1), greedy(max_tokens=200))
            first = await anext(stream)
            assert first.outputs[0].token_ids
            before = time.monotonic()
            kill(slow.pid)
            with pytest.raises(EngineDeadError, match="its process has ended"):
                await collect(stream)
            assert time.monotonic() - before < 20
            with pytest.raises(EngineDeadError):
                await engine.add_request("r2", prompt_ids(1), greedy())

    run_async(run)


def test_an_idle_actor_that_dies_is_told(ray_cluster, tmp_path):
    async def run() -> None:
        slow = Slow(tmp_path / "pid")
        async with engine_in_actor(slow) as engine:
            kill(slow.pid)
            await eventually(lambda: engine.is_dead)

    run_async(run)


@pytest.mark.parametrize(
    "factory, kind, message",
    [
        (refused, ValueError, "use an even one"),
        (broken, EngineDeadError, "OSError: no such disk"),
        (crashing, EngineDeadError, "its process has ended"),
    ],
)
def test_an_engine_that_cannot_start_says_why(ray_cluster, factory, kind, message):
    async def run() -> None:
        with pytest.raises(kind, match=message):
            async with engine_in_actor(factory):
                raise AssertionError("it has started")

    run_async(run)


def test_no_room_in_the_cluster_is_an_error_of_the_user(ray_cluster, monkeypatch):
    monkeypatch.setattr("folovllm.distributed.ray_cluster.PLACEMENT_SECONDS", 1.0)

    async def run() -> None:
        with pytest.raises(ValueError, match="no room for 999 CPU"):
            async with engine_in_actor(fake_executor, cpu_threads=999):
                raise AssertionError("it has started")

    run_async(run)


def test_close_ends_the_process_and_frees_its_place(ray_cluster, tmp_path):
    async def run() -> None:
        slow = Slow(tmp_path / "pid")
        async with engine_in_actor(slow) as engine:
            await engine.add_request("r", prompt_ids(1), greedy(max_tokens=200))
        wait_for(lambda: not is_alive(slow.pid), "the actor's process still runs")
        wait_for(all_cpus_are_free, "its CPU is not free")

    run_async(run)


class SlowReplicas:
    """Like Slow, for several engines: each writes its process id under its number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, config: EngineConfig) -> SlowExecutor:
        return SlowExecutor(self._file(config.parallel_config.data_parallel_rank))

    def pid(self, replica: int) -> int:
        return int(self._file(replica).read_text())

    def _file(self, replica: int) -> Path:
        return self.folder / str(replica)


def test_two_replicas_in_actors_lose_no_request_when_one_is_killed(ray_cluster, tmp_path):
    """Its requests go to the other one, with the tokens that the reader has; and it is started again."""
    slow = SlowReplicas(tmp_path)
    config = serving_config(max_num_seqs=4)
    parallel = ParallelConfig(data_parallel_size=2, data_parallel_backend="ray")
    config = dataclasses.replace(config, parallel_config=parallel)

    async def run() -> None:
        engine = await AsyncLLM.start(config, Path("unused"), byte_level(), executor_factory=slow)
        async with engine:
            prompts = [prompt_ids(i) for i in range(12)]
            streams = [await engine.add_request(f"r{i}", p, greedy(max_tokens=60)) for i, p in enumerate(prompts)]
            readers = [asyncio.create_task(collect(stream)) for stream in streams]
            await eventually(lambda: engine.stats.num_generation_tokens > 40)
            first = slow.pid(1)
            kill(first)
            assert await asyncio.gather(*readers) == [oracle(p, 60) for p in prompts]
            await eventually(lambda: engine.num_alive == engine.num_engines == 2)
            assert slow.pid(1) != first
            await assert_all_free(engine)
        wait_for(lambda: not is_alive(slow.pid(0)) and not is_alive(slow.pid(1)), "an engine is left")

    run_async(run)


def test_an_engine_in_an_actor_may_have_ranks_in_actors(ray_cluster, tmp_path_factory):
    """Two kinds of actors, with places of their own: one for the loop, two for the ranks."""
    model = make_parallel("biases", tmp_path_factory.mktemp("biases"))
    args = {"dtype": "float32", "max_model_len": 64, "cpu_threads": 1}
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    expected = LLM(str(model), **args).generate("the other", params, use_tqdm=False)[0].outputs[0].token_ids

    async def run() -> None:
        engine = await start_async_llm(
            str(model),
            tensor_parallel_size=2,
            distributed_executor_backend="ray",
            data_parallel_backend="ray",
            **args,
        )
        async with engine:
            outputs = [output async for output in engine.generate("the other", params, "r")]
            assert outputs[-1].outputs[0].token_ids == expected

    run_async(run)
