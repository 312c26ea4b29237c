"""RequestOutputCollector and RequestStream: a slow reader loses nothing and costs a bounded amount of memory."""

import asyncio
import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.engine.request_stream import RequestStream
from folovllm.outputs import CompletionOutput, Logprob, RequestOutput
from folovllm.parts import load_part
from folovllm.sampling_params import RequestOutputKind
from tests.m8.serving_helpers import run_async

pytestmark = pytest.mark.m8

DELTA, CUMULATIVE = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE


def make_collector(kind: RequestOutputKind = DELTA) -> RequestOutputCollector:
    collector: RequestOutputCollector = load_part("engine.output_collector")(kind)
    return collector


def output(*completions: CompletionOutput, finished: bool = False, prompt_logprobs=None) -> RequestOutput:
    return RequestOutput("r", "Hi", [1, 2], list(completions), finished, prompt_logprobs)


def completion(index: int, token_ids: list[int], finish_reason: str | None = None, logprobs: bool = False):
    entries = [{i: Logprob(-0.5)} for i in token_ids] if logprobs else None
    return CompletionOutput(index, "".join(map(chr, token_ids)), token_ids, None, entries, finish_reason)


def test_an_output_that_is_taken_in_time_is_handed_on_as_it_is():
    collector, first = make_collector(), output(completion(0, [65]))
    collector.put(first)
    assert collector.get_nowait() is first
    assert collector.get_nowait() is None


@given(
    deltas=st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(65, 90), max_size=3)), min_size=1),
    takes=st.sets(st.integers(0, 20)),
    logprobs=st.booleans(),
)
def test_deltas_lose_nothing_however_slowly_they_are_read(deltas, takes, logprobs):
    """With n > 1 answers were lost: https://github.com/vllm-project/vllm/issues/24029"""
    collector, read = make_collector(), []
    for i, (index, token_ids) in enumerate(deltas):
        collector.put(output(completion(index, token_ids, logprobs=logprobs)))
        if i in takes:
            read.append(collector.get_nowait())
    read.append(collector.get_nowait())
    for index in range(3):
        parts = [part for taken in read if taken is not None for part in taken.outputs if part.index == index]
        expected = [i for at, token_ids in deltas if at == index for i in token_ids]
        assert [i for part in parts for i in part.token_ids] == expected
        assert "".join(part.text for part in parts) == "".join(map(chr, expected))
        if logprobs:
            assert [next(iter(entry)) for part in parts for entry in part.logprobs] == expected


def test_merging_changes_nothing_that_was_put():
    collector = make_collector()
    outputs = [
        output(completion(0, [65], logprobs=True)),
        output(completion(0, [66], "stop", logprobs=True), finished=True),
    ]
    before = copy.deepcopy(outputs)
    for one in outputs:
        collector.put(one)
    merged = collector.get_nowait()
    assert outputs == before
    assert merged is not None and merged.finished and merged.outputs[0].finish_reason == "stop"
    assert merged.outputs[0].text == "AB" and len(merged.outputs[0].logprobs or []) == 2


def test_cumulative_outputs_keep_the_newest_of_each_completion():
    collector = make_collector(CUMULATIVE)
    for index, token_ids in ((0, [65]), (1, [66]), (0, [65, 67])):
        collector.put(output(completion(index, token_ids)))
    merged = collector.get_nowait()
    assert merged is not None and [part.text for part in merged.outputs] == ["AC", "B"]


def test_prompt_logprobs_survive_a_merge():
    collector = make_collector()
    collector.put(output(completion(0, [65]), prompt_logprobs=[None, {2: Logprob(-1.0)}]))
    collector.put(output(completion(0, [66])))
    merged = collector.get_nowait()
    assert merged is not None and merged.prompt_logprobs == [None, {2: Logprob(-1.0)}]


def test_a_reader_that_never_reads_costs_one_output():
    collector = make_collector()
    for i in range(1000):
        collector.put(output(completion(0, [65 + i % 26])))
    merged = collector.get_nowait()
    assert merged is not None and len(merged.outputs) == 1 and len(merged.outputs[0].token_ids) == 1000
    assert collector.get_nowait() is None


def test_an_error_comes_after_what_was_put_before_it():
    async def test() -> None:
        collector = make_collector()
        collector.put(output(completion(0, [65])))
        collector.put(RuntimeError("broken"))
        assert (await collector.get()).outputs[0].text == "A"
        for _ in range(2):  # a reader that asks once more does not wait forever
            with pytest.raises(RuntimeError, match="broken"):
                await collector.get()

    run_async(test)


def test_get_waits_for_the_next_output():
    async def test() -> None:
        collector = make_collector()
        reader = asyncio.create_task(collector.get())
        await asyncio.sleep(0)
        assert not reader.done()
        collector.put(output(completion(0, [65])))
        assert (await reader).outputs[0].text == "A"

    run_async(test)


# ---- the stream


class Aborts:
    """Takes the place of AsyncLLM.abort."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def __call__(self, request_id: str) -> None:
        self.ids.append(request_id)


def make_stream() -> tuple[RequestStream, RequestOutputCollector, Aborts]:
    collector, aborts = make_collector(), Aborts()
    stream: RequestStream = load_part("engine.request_stream")("r", collector, aborts)
    return stream, collector, aborts


def test_a_stream_ends_after_its_finished_output_and_aborts_nothing():
    async def test() -> None:
        stream, collector, aborts = make_stream()
        collector.put(output(completion(0, [65])))
        assert (await anext(stream)).outputs[0].text == "A"
        collector.put(output(completion(0, [66], "length"), finished=True))
        assert [o.outputs[0].text async for o in stream] == ["B"]
        await stream.aclose()
        assert aborts.ids == []

    run_async(test)


def test_leaving_a_stream_aborts_once():
    async def test() -> None:
        stream, collector, aborts = make_stream()
        collector.put(output(completion(0, [65])))
        with pytest.raises(ZeroDivisionError):
            async with stream:
                async for _ in stream:
                    raise ZeroDivisionError
        await stream.aclose()
        assert aborts.ids == ["r"]
        assert [o async for o in stream] == []

    run_async(test)


def test_a_cancelled_reader_aborts():
    async def test() -> None:
        stream, _, aborts = make_stream()
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert aborts.ids == ["r"]

    run_async(test)


def test_a_failed_request_raises_and_is_not_aborted():
    async def test() -> None:
        stream, collector, aborts = make_stream()
        collector.put(RuntimeError("broken"))
        with pytest.raises(RuntimeError, match="broken"):
            await anext(stream)
        await stream.aclose()
        assert aborts.ids == []

    run_async(test)
