"""AsyncLLM on the fake model in a thread: streams, long texts and slow readers. No weights, no torch.

How requests and engines end is in test_async_llm_ends.py, and what a process adds in test_core_client.py.
"""

import asyncio
import dataclasses
import gc
import random
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.engine.async_llm import AsyncLLM, EngineClosingError
from folovllm.engine.async_tokenizer import LONG_TEXT
from folovllm.engine.tokenizer import Tokenizer
from folovllm.request import Request
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from tests.m1.tiny_tokenizers import byte_level
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
