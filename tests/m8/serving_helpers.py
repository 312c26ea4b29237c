"""Builders for tests of serving: an AsyncLLM on the fake model, in a thread, with a tiny tokenizer. No weights.

E.g.  async with make_async_llm(max_num_seqs=2) as engine: ...
"""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.async_llm import AsyncLLM, EngineObserver
from folovllm.engine.start_core import ExecutorFactory
from folovllm.engine.tokenizer import Tokenizer
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.learn.toy_engine import make_config
from folovllm.outputs import EngineStats, ModelRunnerOutput, RequestOutput
from folovllm.request import Request
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from tests.m1.tiny_tokenizers import byte_level

AsyncTest = Callable[..., Coroutine[Any, Any, None]]
VOCAB_SIZE = 400  # at most the tokenizer's 420 ids: each token of the fake model has a text
TIMEOUT = 60.0  # seconds; no test waits for it unless it fails


def serving_config(**engine_args: Any) -> EngineConfig:
    """A resolved config: small blocks; chunked prefill, prefix caching and statistics as in the server's default."""
    disable_log_stats = engine_args.pop("disable_log_stats", False)
    defaults: dict[str, Any] = {
        "max_model_len": 256,
        "block_size": 16,
        "num_kv_blocks": 257,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
    }
    config = make_config(**defaults | engine_args)
    arch = dataclasses.replace(config.model_config.arch, vocab_size=VOCAB_SIZE, eos_token_ids=())
    model_config = dataclasses.replace(config.model_config, architecture=arch)
    return dataclasses.replace(config, model_config=model_config, disable_log_stats=disable_log_stats)


def fake_executor(config: EngineConfig) -> FakeExecutor:
    """The executor of `make_async_llm`; a function of a module, so that a spawned process can import it."""
    return FakeExecutor(vocab_size=VOCAB_SIZE)


@contextlib.asynccontextmanager
async def make_async_llm(
    executor_factory: ExecutorFactory = fake_executor,
    tokenizer: Tokenizer | None = None,
    in_process: bool = False,
    sampling_defaults: dict[str, Any] | None = None,
    skip_tokenizer: bool = False,
    **engine_args: Any,
) -> AsyncIterator[AsyncLLM]:
    """An AsyncLLM on a fake executor, in a thread unless `in_process`; it is shut down at the end."""
    if not skip_tokenizer and tokenizer is None:
        tokenizer = byte_level()
    engine = await AsyncLLM.start(
        serving_config(**engine_args),
        Path("unused"),
        tokenizer,
        in_process=in_process,
        executor_factory=executor_factory,
        sampling_defaults=sampling_defaults,
    )
    try:
        yield engine
    finally:
        await engine.shutdown()


class GatedExecutor(FakeExecutor):
    """Waits in every step while `gate` is closed, so that a test can act in the middle of a step."""

    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE)
        self.gate = threading.Event()
        self.gate.set()
        self.num_free_steps = 0  # that the closed gate lets through
        self.num_entered = 0
        self.seconds = 0.0  # that a step takes at least: a fake step is faster than the front end
        self.error: BaseException | None = None

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        self.num_entered += 1
        if self.num_free_steps > 0:
            self.num_free_steps -= 1
        else:
            assert self.gate.wait(TIMEOUT)
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return super().sample(handle)

    async def stop_in_next_step(self) -> None:
        """Closes the gate and waits until a step stands in front of it."""
        self.gate.clear()
        before = self.num_entered
        await eventually(lambda: self.num_entered > before)


class Gated:
    """An executor factory that keeps what it made."""

    def __init__(self) -> None:
        self.executor = GatedExecutor()

    def __call__(self, config: EngineConfig) -> GatedExecutor:
        return self.executor


def run_async(make_coroutine: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Runs an async test, bounded in time, on a fresh event loop."""

    async def bounded() -> Any:
        return await asyncio.wait_for(make_coroutine(), TIMEOUT)

    return asyncio.run(bounded())


class Recorder(EngineObserver):
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.outputs: list[RequestOutput] = []
        self.causes: list[str] = []

    def on_added(self, request: Request) -> None:
        self.added.append(request.request_id)

    def on_step(self, stats: EngineStats, outputs: list[RequestOutput]) -> None:
        self.outputs += outputs

    def on_dead(self, cause: str) -> None:
        self.causes.append(cause)

    def ends(self) -> list[tuple[str, str | None]]:
        return [(o.request_id, o.outputs[0].finish_reason) for o in self.outputs if o.finished]


def engine_test(**engine_args: Any) -> Callable[[AsyncTest], Callable[[], None]]:
    """Decorator for an async test that gets an engine as its argument."""

    def decorate(test: AsyncTest) -> Callable[[], None]:
        def run() -> None:
            async def with_engine() -> None:
                async with make_async_llm(**engine_args) as engine:
                    await test(engine)

            run_async(with_engine)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def gated_test(**engine_args: Any) -> Callable[[AsyncTest], Callable[[], None]]:
    """The same with the engine and its gated executor."""

    def decorate(test: AsyncTest) -> Callable[[], None]:
        def run() -> None:
            async def with_engine() -> None:
                gated = Gated()
                async with make_async_llm(gated, **engine_args) as engine:
                    try:
                        await test(engine, gated.executor)
                    finally:
                        gated.executor.gate.set()

            run_async(with_engine)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def greedy(max_tokens: int = 8, **changes: Any) -> SamplingParams:
    """Parameters under which the fake model's answer is the oracle's. Streams deltas unless told otherwise."""
    defaults: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "output_kind": RequestOutputKind.DELTA}
    return SamplingParams(max_tokens=max_tokens, **defaults | changes)


def oracle(prompt: list[int], max_tokens: int) -> list[int]:
    """The tokens that the fake model must give."""
    return fake_tokens(prompt, max_tokens, VOCAB_SIZE)


def prompt_ids(seed: int, length: int = 10) -> list[int]:
    """Different token ids for different seeds."""
    return [(seed * 131 + i * 7 + seed * i) % VOCAB_SIZE for i in range(length)]


async def collect(stream: AsyncIterator[RequestOutput], index: int = 0) -> list[int]:
    """All token ids of one completion of a stream of deltas."""
    token_ids: list[int] = []
    async for output in stream:
        token_ids += [i for completion in output.outputs if completion.index == index for i in completion.token_ids]
    return token_ids


async def eventually(condition: Callable[[], Any]) -> None:
    """Waits until the condition holds: what another thread does takes a moment."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], Any]) -> None:
    """`eventually` for a test without an event loop."""
    asyncio.run(eventually(condition))


async def assert_all_free(engine: AsyncLLM) -> None:
    """No request is left on either side, and no block is held."""
    await eventually(
        lambda: engine._requests.is_settled() and engine.stats.num_running == engine.stats.num_waiting == 0
    )
    assert engine.num_unfinished == 0 and engine.stats.kv_cache_usage == 0.0
    assert not engine._calls
