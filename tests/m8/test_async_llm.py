"""AsyncLLM on the fake model in a thread: streams, aborts, failures, drain and death. No weights, no torch.

What a process adds is in test_core_client.py.
"""

import asyncio
import dataclasses
import gc
import logging
import random
import threading
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.config import EngineConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.async_llm import AsyncLLM, EngineClosingError, EngineDeadError, RequestFailedError
from folovllm.engine.async_tokenizer import LONG_TEXT
from folovllm.engine.detokenizer import IncrementalDetokenizer
from folovllm.engine.tokenizer import Tokenizer
from folovllm.executor.fake import FakeExecutor
from folovllm.outputs import EngineStats, ModelRunnerOutput, RequestOutput
from folovllm.request import Request
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from tests.m1.tiny_tokenizers import byte_level
from tests.m8.serving_helpers import (
    VOCAB_SIZE,
    Gated,
    assert_all_free,
    collect,
    greedy,
    make_async_llm,
    oracle,
    prompt_ids,
    run_async,
)

pytestmark = pytest.mark.m8


class Recorder:
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


def engine_test(**engine_args: Any):
    """Decorator for an async test that gets an engine as its argument."""

    def decorate(test):
        def run() -> None:
            async def with_engine() -> None:
                async with make_async_llm(**engine_args) as engine:
                    await test(engine)

            run_async(with_engine)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def gated_test(**engine_args: Any):
    """The same with the engine and its gated executor."""

    def decorate(test):
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


# ---- streams


@engine_test()
async def test_concurrent_streams_get_their_own_answers(engine: AsyncLLM):
    streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(20)) for i in range(12)]
    answers = await asyncio.gather(*map(collect, streams))
    assert answers == [oracle(prompt_ids(i), 20) for i in range(12)]
    await assert_all_free(engine)


@engine_test()
async def test_output_kinds(engine: AsyncLLM):
    texts = {}
    for kind in RequestOutputKind:
        outputs = [o async for o in engine.generate("the quick", greedy(12, output_kind=kind), f"r-{kind.name}")]
        assert outputs[-1].finished and not any(o.finished for o in outputs[:-1])
        assert outputs[-1].outputs[0].finish_reason == "length"
        assert all(o.prompt == "the quick" for o in outputs)
        texts[kind] = [o.outputs[0].text for o in outputs]
    (final,) = texts[RequestOutputKind.FINAL_ONLY]
    assert "".join(texts[RequestOutputKind.DELTA]) == texts[RequestOutputKind.CUMULATIVE][-1] == final != ""
    await assert_all_free(engine)


@gated_test()
async def test_a_stop_string_ends_the_request_in_the_core_too(engine, executor):
    executor.seconds = 0.005
    (whole,) = [o async for o in engine.generate([7] * 5, greedy(40, output_kind=RequestOutputKind.FINAL_ONLY), "a")]
    text = whole.outputs[0].text
    stop = text[3:6]
    (cut,) = [
        o async for o in engine.generate([7] * 5, greedy(40, output_kind=RequestOutputKind.FINAL_ONLY, stop=stop), "b")
    ]
    assert cut.outputs[0].finish_reason == "stop" and cut.outputs[0].stop_reason == stop
    assert cut.outputs[0].text == text[: text.index(stop)]
    await assert_all_free(engine)
    assert engine.stats.num_generation_tokens < 80


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_several_completions(kind):
    async def test() -> None:
        async with make_async_llm() as engine:
            params = SamplingParams(n=3, temperature=1.0, max_tokens=6, ignore_eos=True, output_kind=kind)
            stream = await engine.add_request("r", prompt_ids(1), params)
            assert engine.num_unfinished == 3
            tokens: dict[int, list[int]] = {}
            async for output in stream:
                assert output.request_id == "r"
                for part in output.outputs:
                    old = tokens.get(part.index, []) if kind is RequestOutputKind.DELTA else []
                    tokens[part.index] = old + part.token_ids
            assert tokens == dict.fromkeys(range(3), oracle(prompt_ids(1), 6))
            await assert_all_free(engine)

    run_async(test)


@engine_test()
async def test_bad_requests_add_nothing(engine: AsyncLLM):
    bad: list[tuple[Any, Any]] = [
        ([], greedy()),
        ([VOCAB_SIZE], greedy()),
        ([1] * 256, greedy()),
        ({"prompt": 5}, greedy()),
        ({"prompt": "a" * 10 * LONG_TEXT, "promt": 1}, greedy()),
        ("a" * 1_000_000, greedy()),
        ("\ud800" * (LONG_TEXT + 1), greedy()),
        ([1], {"temperature": 0}),
        ([1], greedy(allowed_token_ids=[VOCAB_SIZE])),
    ]
    for prompt, params in bad:
        with pytest.raises(ValueError):
            await engine.add_request("r", prompt, params)
    assert engine.num_unfinished == 0
    assert await collect(await engine.add_request("r", prompt_ids(1), greedy(5))) == oracle(prompt_ids(1), 5)


@engine_test()
async def test_an_id_that_is_in_use_is_refused(engine: AsyncLLM):
    stream = await engine.add_request("r", prompt_ids(1), greedy(50))
    with pytest.raises(ValueError, match="in use"):
        await engine.add_request("r", prompt_ids(2), greedy(5))
    assert await collect(stream) == oracle(prompt_ids(1), 50)


def test_unseeded_requests_draw_their_seeds_in_the_order_of_arrival():
    async def draw(prompts: list[Any]) -> list[int]:
        seeds: dict[str, int] = {}

        class Seeds(Recorder):
            def on_added(self, request: Request) -> None:
                seeds[request.request_id] = request.seed

        async with make_async_llm() as engine:
            engine.add_observer(Seeds())
            streams = [await engine.add_request(f"r{i}", prompt, greedy(1)) for i, prompt in enumerate(prompts)]
            await asyncio.gather(*map(collect, streams))
        return [seeds[f"r{i}"] for i in range(len(prompts))]

    first = run_async(lambda: draw([prompt_ids(i) for i in range(4)]))
    assert first == run_async(lambda: draw(["a text", *(prompt_ids(i) for i in range(3))])) and len(set(first)) == 4


# ---- long texts


class SlowTokenizer(Tokenizer):
    """Encodes long texts when it may. It stands in for the seconds that a megabyte takes."""

    def __init__(self) -> None:
        self.__dict__ |= vars(byte_level()) | {"max_chars_per_token": 100}
        self.may_go = threading.Event()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > LONG_TEXT:
            assert self.may_go.wait(30)
        return byte_level().encode(text, add_special_tokens)[:200]


def test_streams_go_on_while_a_long_text_is_encoded():
    """https://github.com/vllm-project/vllm/issues/24910"""

    async def test() -> None:
        tokenizer = SlowTokenizer()
        async with make_async_llm(tokenizer=tokenizer) as engine:
            long = asyncio.create_task(engine.add_request("long", "a" * (LONG_TEXT + 1), greedy(3)))
            chat = asyncio.create_task(engine.encode("b" * (LONG_TEXT + 1)))
            assert await collect(await engine.add_request("r", prompt_ids(1), greedy(20))) == oracle(prompt_ids(1), 20)
            assert not long.done() and not chat.done() and engine.num_unfinished == 0
            tokenizer.may_go.set()
            assert len(await collect(await long)) == 3 and len(await chat) == 200

    run_async(test)


def test_a_request_that_is_cancelled_while_its_text_is_encoded_leaves_nothing():
    """https://github.com/vllm-project/vllm/issues/57061"""

    async def test() -> None:
        tokenizer = SlowTokenizer()
        async with make_async_llm(tokenizer=tokenizer) as engine:
            adding = asyncio.create_task(engine.add_request("r", "a" * (LONG_TEXT + 1), greedy(3)))
            await asyncio.sleep(0.01)
            adding.cancel()
            tokenizer.may_go.set()
            with pytest.raises(asyncio.CancelledError):
                await adding
            await assert_all_free(engine)

    run_async(test)


def test_a_request_whose_text_was_being_encoded_when_the_drain_began_is_refused():
    async def test() -> None:
        tokenizer = SlowTokenizer()
        async with make_async_llm(tokenizer=tokenizer) as engine:
            adding = asyncio.create_task(engine.add_request("r", "a" * (LONG_TEXT + 1), greedy(3)))
            await asyncio.sleep(0.01)
            assert await engine.drain(0.0) == 0
            tokenizer.may_go.set()
            with pytest.raises(EngineClosingError):
                await adding
            await assert_all_free(engine)

    run_async(test)


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded():
    async def test() -> None:
        tokenizer = SlowTokenizer()  # would wait
        async with make_async_llm(tokenizer=tokenizer) as engine:
            with pytest.raises(ValueError, match=r"the prompt of 20000000 characters is longer than .* 256 tokens"):
                await engine.add_request("r", "a" * 20_000_000, greedy())
            with pytest.raises(ValueError, match=r"the prompt of 400000 characters is longer than"):
                await engine.render_chat([{"role": "user", "content": "a" * 400_000}], "{{ messages[0].content }}")

    run_async(test)


@engine_test(skip_tokenizer=True)
async def test_without_a_tokenizer_prompts_are_token_ids(engine: AsyncLLM):
    assert await collect(await engine.add_request("r", prompt_ids(1), greedy(5))) == oracle(prompt_ids(1), 5)
    for attempt in (engine.encode("x"), engine.render_chat([]), engine.add_request("s", "x" * 9999, greedy())):
        with pytest.raises(ValueError, match="tokenizer"):
            await attempt


@engine_test()
async def test_render_chat_gives_text_and_token_ids(engine: AsyncLLM):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for content in ("the fox", "the fox " * 300, "好" * (LONG_TEXT // 2)):
        prompt = await engine.render_chat([{"role": "user", "content": content}], template)
        assert prompt == {"prompt": content, "prompt_token_ids": byte_level().encode(content)}


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


@engine_test()
async def test_calls(engine: AsyncLLM):
    stream = await engine.add_request("r", prompt_ids(1, 40), greedy(3))
    await collect(stream)
    assert await engine.reset_prefix_cache() is True
    with pytest.raises(RuntimeError, match="no_such_call"):
        await engine._call("no_such_call")


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


# ---- slow readers and memory


@gated_test()
async def test_a_reader_that_sleeps_holds_up_no_other_and_gets_everything(engine, executor):
    slow = await engine.add_request("slow", prompt_ids(1), greedy(200))
    assert await collect(await engine.add_request("fast", prompt_ids(2), greedy(200))) == oracle(prompt_ids(2), 200)
    await assert_all_free(engine)
    outputs = [o async for o in slow]
    assert len(outputs) == 1 and outputs[0].outputs[0].token_ids == oracle(prompt_ids(1), 200)


def test_nothing_grows_with_the_number_of_finished_requests():
    async def serve(engine: AsyncLLM, count: int, start: int) -> None:
        async def one(i: int) -> None:
            stream = await engine.add_request(f"r{i}", prompt_ids(i % 50), greedy(3, stop="zzz"))
            if i % 5 == 0:
                await anext(stream)
                await stream.aclose()
            else:
                assert await collect(stream) == oracle(prompt_ids(i % 50), 3)

        for first in range(start, start + count, 50):
            await asyncio.gather(*(one(i) for i in range(first, first + 50)))
        await collect(await engine.add_request("last", prompt_ids(1), greedy(3)))  # the worker hears who has finished
        await assert_all_free(engine)

    def num_objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    async def test() -> None:
        async with make_async_llm() as engine:
            await serve(engine, 1000, start=0)  # the hit-rate window is full, every text is in its cache
            before = num_objects()
            await serve(engine, 1000, start=1000)
            assert num_objects() - before < 20

    run_async(test)


# ---- all together


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one client does."""

    prompt_len: int
    max_tokens: int
    leaves_after: int | None  # outputs; None: stays to the end
    pause: float


plans = st.builds(
    Plan,
    prompt_len=st.integers(1, 30),
    max_tokens=st.integers(1, 20),
    leaves_after=st.one_of(st.none(), st.integers(0, 6)),
    pause=st.sampled_from([0.0, 0.0, 0.001]),
)


@settings(max_examples=40)
@given(
    clients=st.lists(plans, min_size=1, max_size=10), num_kv_blocks=st.sampled_from([14, 60]), seed=st.integers(0, 99)
)
def test_random_clients(clients, num_kv_blocks, seed):
    """Adds, aborts and slow readers in any order: each answer is the oracle's, and all blocks are free at the end."""

    async def client(engine: AsyncLLM, i: int, plan: Plan) -> None:
        await asyncio.sleep(rng.choice([0.0, 0.001]))
        prompt = prompt_ids(seed + i, plan.prompt_len)
        token_ids: list[int] = []
        async with await engine.add_request(f"r{i}", prompt, greedy(plan.max_tokens)) as stream:
            num_outputs = 0
            while plan.leaves_after is None or num_outputs < plan.leaves_after:
                output = await anext(stream, None)
                if output is None:
                    break
                num_outputs += 1
                token_ids += output.outputs[0].token_ids
                await asyncio.sleep(plan.pause)
        expected = oracle(prompt, plan.max_tokens)
        assert token_ids == (expected if plan.leaves_after is None else expected[: len(token_ids)])

    async def test() -> None:
        args = {"num_kv_blocks": num_kv_blocks, "block_size": 4, "max_model_len": 52}
        async with make_async_llm(**args) as engine:
            await asyncio.gather(*(client(engine, i, plan) for i, plan in enumerate(clients)))
            await assert_all_free(engine)

    rng = random.Random(seed)
    run_async(test)


def test_what_a_step_costs():
    """Prints it: `pytest -s -k what_a_step_costs`. 32 streams on the fake model, whose own step is included."""

    async def test() -> None:
        async with make_async_llm(num_kv_blocks=2000) as engine:
            start = time.perf_counter()
            streams = [await engine.add_request(f"r{i}", prompt_ids(i), greedy(100)) for i in range(32)]
            answers = await asyncio.gather(*map(collect, streams))
            seconds = time.perf_counter() - start
            print(f"\n32 streams: {seconds / engine.stats.num_steps * 1e3:.2f} ms per step")
            assert answers == [oracle(prompt_ids(i), 100) for i in range(32)]

    run_async(test)
