"""How a request of an AsyncLLM ends before its time, and how the engine ends: aborts, failures, drain and death.

Also what a caller asks of the engine beside requests: calls of the core, watching, observing.
"""

import asyncio
import logging
import threading
from collections import Counter
from typing import Any

import pytest

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.async_llm import AsyncLLM, EngineClosingError, EngineDeadError, RequestFailedError
from folovllm.engine.detokenizer import IncrementalDetokenizer
from folovllm.executor.fake import FakeExecutor
from folovllm.outputs import EngineStats, ModelRunnerOutput, RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from tests.m8.serving_helpers import (
    VOCAB_SIZE,
    Recorder,
    assert_all_free,
    collect,
    engine_test,
    gated_test,
    greedy,
    make_async_llm,
    oracle,
    prompt_ids,
    run_async,
)

pytestmark = pytest.mark.m8


# ---- aborts


@gated_test()
async def test_an_abort_in_mid_step_ends_the_stream_at_once_and_frees_the_blocks_right_after_it(engine, executor):
    stream = await engine.add_request("r", prompt_ids(1, 40), greedy(200))
    got = (await anext(stream)).outputs[0].token_ids
    await executor.stop_in_next_step()
    engine.abort(["r", "unknown"])
    rest = [o async for o in stream]  # the step has not ended
    assert rest[-1].finished and rest[-1].outputs[0].finish_reason == "abort" and engine.num_unfinished == 0
    got += [i for o in rest for i in o.outputs[0].token_ids]
    assert got == oracle(prompt_ids(1, 40), len(got))
    num_steps = executor.num_entered
    executor.gate.set()
    await assert_all_free(engine)
    assert executor.num_entered == num_steps


@pytest.mark.parametrize("how", ["break", "cancel", "aclose"])
def test_leaving_a_stream_frees_its_blocks(how):
    async def test() -> None:
        async with make_async_llm() as engine:

            async def read() -> None:
                async for _ in engine.generate(prompt_ids(1), greedy(240), "r"):
                    if how == "cancel":
                        started.set()
                    else:
                        break

            started = asyncio.Event()
            if how == "aclose":
                stream = await engine.add_request("r", prompt_ids(1), greedy(240))
                await stream.aclose()
                await stream.aclose()
            else:
                reader = asyncio.create_task(read())
                if how == "cancel":
                    await started.wait()
                    reader.cancel()
                await asyncio.wait([reader])
            await assert_all_free(engine)

    run_async(test)


@gated_test()
async def test_an_id_can_be_used_again_as_soon_as_its_request_has_left(engine, executor):
    """https://github.com/vllm-project/vllm/issues/23697"""
    await engine.add_request("r", prompt_ids(1), greedy(200))
    await executor.stop_in_next_step()
    for i in (2, 3):
        engine.abort("r")
        stream = await engine.add_request("r", prompt_ids(i), greedy(9))
    executor.gate.set()
    assert await collect(stream) == oracle(prompt_ids(3), 9)
    await assert_all_free(engine)


@gated_test()
async def test_an_abort_ends_all_completions(engine, executor):
    recorder = Recorder()
    engine.add_observer(recorder)
    params = SamplingParams(n=3, temperature=1.0, max_tokens=90, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    stream = await engine.add_request("r", prompt_ids(1), params)
    await anext(stream)
    await executor.stop_in_next_step()
    engine.abort("r")
    executor.gate.set()
    last = [o async for o in stream][-1]
    assert last.finished and {part.finish_reason for part in last.outputs} == {"abort"} and len(last.outputs) == 3
    await assert_all_free(engine)
    assert recorder.added == ["r"] and recorder.ends() == [("r", "abort")]


# ---- failures


class PoisonedExecutor(FakeExecutor):
    """Raises whenever request X is in the step."""

    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE)

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        if any(request_id.endswith("X") for request_id in handle.num_scheduled_tokens):
            raise RuntimeError("poison")
        return super().sample(handle)


@pytest.mark.parametrize("n", [1, 2])
def test_a_poisonous_request_raises_and_the_others_finish(n, caplog):
    caplog.set_level(logging.CRITICAL, "folovllm")

    async def test() -> None:
        async with make_async_llm(lambda _: PoisonedExecutor()) as engine:
            recorder = Recorder()
            engine.add_observer(recorder)
            streams = {f"r{i}": await engine.add_request(f"r{i}", prompt_ids(i), greedy(9)) for i in range(8)}
            params = greedy(9) if n == 1 else greedy(9, n=n, temperature=1.0)
            poisonous = await engine.add_request("X", prompt_ids(99), params)
            answers = await asyncio.gather(*map(collect, streams.values()))
            assert answers == [oracle(prompt_ids(i), 9) for i in range(8)]
            with pytest.raises(RequestFailedError, match="'X' failed inside the engine"):
                await collect(poisonous)
            assert not engine.is_dead
            await assert_all_free(engine)
            assert Counter(recorder.ends())["X", "error"] == 1
            assert await collect(await engine.add_request("new", prompt_ids(3), greedy(5))) == oracle(prompt_ids(3), 5)

    run_async(test)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("at_token", [1, 5])
def test_a_request_whose_text_cannot_be_made_fails_alone(n, at_token, monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL, "folovllm")
    update = IncrementalDetokenizer.update

    def faulty_update(self: IncrementalDetokenizer, new_token_ids: list[int], finish_reason: str | None = None) -> Any:
        if self.is_bad and (len(self.token_ids) + 1 >= at_token or finish_reason):
            raise RuntimeError("a fault in the tokenizer")
        return update(self, new_token_ids, finish_reason)

    init = IncrementalDetokenizer.__init__

    def marking_init(self: Any, tokenizer: Any, params: SamplingParams, *args: Any) -> None:
        init(self, tokenizer, params, *args)
        self.is_bad = params.stop_token_ids == [3]

    monkeypatch.setattr(IncrementalDetokenizer, "update", faulty_update)
    monkeypatch.setattr(IncrementalDetokenizer, "__init__", marking_init)

    async def test() -> None:
        async with make_async_llm() as engine:
            recorder = Recorder()
            engine.add_observer(recorder)
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(9)) for i in range(4)]
            params = greedy(9, stop_token_ids=[3], min_tokens=9)
            bad = await engine.add_request("bad", [5], params if n == 1 else params.replace(n=n, temperature=1.0))
            assert await asyncio.gather(*map(collect, streams)) == [oracle(prompt_ids(i), 9) for i in range(4)]
            with pytest.raises(RequestFailedError):
                await collect(bad)
            await assert_all_free(engine)
            assert Counter(recorder.ends())["bad", "error"] == 1

    run_async(test)


# ---- the end


@gated_test()
async def test_a_death_in_a_step_reaches_every_stream_with_its_cause(engine, executor):
    recorder = Recorder()
    engine.add_observer(recorder)
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(100)) for i in range(3)]
    await executor.stop_in_next_step()
    call = asyncio.create_task(engine.reset_prefix_cache())
    with engine.watch() as watcher:
        await asyncio.sleep(0)
        executor.error = SystemExit("out of luck")
        executor.gate.set()
        for stream in streams:
            with pytest.raises(EngineDeadError, match="SystemExit: out of luck"):
                await collect(stream)
        with pytest.raises(EngineDeadError):
            await call
        [line async for line in watcher]  # ends
    assert engine.is_dead and engine.num_unfinished == 0 and recorder.causes == ["SystemExit: out of luck"]
    with pytest.raises(EngineDeadError, match="out of luck"):
        engine.check_health()
    with pytest.raises(EngineDeadError, match="out of luck"):
        await engine.add_request("new", [1], greedy())
    engine.abort("r0")
    assert await engine.drain(5.0) == 0


@gated_test()
async def test_drain_waits_for_what_is_open(engine, executor):
    stream = await engine.add_request("r", prompt_ids(1), greedy(30))
    await executor.stop_in_next_step()
    draining = asyncio.create_task(engine.drain(30.0))
    await asyncio.sleep(0)
    with pytest.raises(EngineClosingError):
        await engine.add_request("new", [1], greedy())
    executor.gate.set()
    assert await draining == 0
    assert await collect(stream) == oracle(prompt_ids(1), 30)


@gated_test()
async def test_drain_aborts_the_rest_at_its_deadline(engine, executor):
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(200)) for i in range(2)]
    await executor.stop_in_next_step()
    assert await engine.drain(0.01) == 2
    for stream in streams:
        assert [o async for o in stream][-1].outputs[0].finish_reason == "abort"
    executor.gate.set()
    await assert_all_free(engine)


@engine_test()
async def test_shutdown_ends_open_streams_and_can_be_called_twice(engine: AsyncLLM):
    stream = await engine.add_request("r", prompt_ids(1), greedy(200))
    await engine.shutdown()
    await engine.shutdown()
    assert [o async for o in stream][-1].outputs[0].finish_reason == "abort"
    with pytest.raises(EngineClosingError):
        await engine.add_request("new", [1], greedy())


@pytest.mark.parametrize("error", [ValueError("block_size is odd"), OSError("no memory")])
def test_a_start_that_fails(error, caplog):
    caplog.set_level(logging.CRITICAL, "folovllm")

    def broken(config: EngineConfig) -> FakeExecutor:
        raise error

    async def test() -> None:
        expected = ValueError if isinstance(error, ValueError) else EngineDeadError
        with pytest.raises(expected, match=str(error)):
            async with make_async_llm(broken):
                pass

    num_threads = threading.active_count()
    run_async(test)
    assert threading.active_count() == num_threads


# ---- beside requests


@engine_test()
async def test_calls(engine: AsyncLLM):
    stream = await engine.add_request("r", prompt_ids(1, 40), greedy(3))
    await collect(stream)
    assert await engine.reset_prefix_cache() is True
    with pytest.raises(RuntimeError, match="no_such_call"):
        await engine._call("no_such_call")


@engine_test()
async def test_watching_and_observing(engine: AsyncLLM):
    class Broken(Recorder):
        def on_step(self, stats: EngineStats, outputs: list[RequestOutput]) -> None:
            raise RuntimeError("a fault in the metrics")

    engine.add_observer(Broken())
    with engine.watch() as watcher:
        header = await anext(watcher)
        assert '"header"' in header and '"snapshot"' in await anext(watcher)
        assert await collect(await engine.add_request("r", prompt_ids(1), greedy(5))) == oracle(prompt_ids(1), 5)
        assert '"r"' in await anext(watcher)
