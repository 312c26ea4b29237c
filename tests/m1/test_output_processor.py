"""The output processor: output kinds, stops, logprobs, timing, n > 1, abort (R1.35 to R1.37, R1.45)."""

from typing import Any

import pytest

from folovllm.engine.output_processor import OutputProcessor
from folovllm.engine.parallel_sampling import ParentRequest
from folovllm.outputs import CompletionOutput, EngineCoreOutput, RequestOutput, TokenLogprobs
from folovllm.request import Request, RequestTimes
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from tests.m1.tiny_tokenizers import byte_ids, byte_level

pytestmark = pytest.mark.m1

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
PROMPT = byte_ids(b"Q:")


def make_request(request_id: str = "r", arrival: float = 100.0, seed: int = 0, **params: Any) -> Request:
    params = {"max_tokens": 50, **params}
    return Request(request_id, list(PROMPT), SamplingParams(**params), eos_token_id=0, arrival_time=arrival, seed=seed)


def make(stream_interval: int = 1, **params: Any) -> OutputProcessor:
    processor = OutputProcessor(byte_level(), stream_interval)
    processor.add_request(make_request(**params), "Q:")
    return processor


def core(text: str | list[int], finish: str | None = None, request_id: str = "r", **fields: Any) -> EngineCoreOutput:
    ids = byte_ids(text.encode()) if isinstance(text, str) else text
    return EngineCoreOutput(request_id, ids, finish_reason=finish, **fields)


def step(processor: OutputProcessor, *outputs: EngineCoreOutput, now: float = 200.0) -> list[RequestOutput]:
    return processor.process_outputs(list(outputs), now).request_outputs


def run(processor: OutputProcessor, text: str, finish: str = "length") -> list[RequestOutput]:
    """One character per step; the last step has `finish`."""
    outputs = [core(char, finish if i == len(text) - 1 else None) for i, char in enumerate(text)]
    return [result for output in outputs for result in step(processor, output)]


def only(outputs: list[RequestOutput]) -> CompletionOutput:
    assert len(outputs) == 1 and len(outputs[0].outputs) == 1
    return outputs[0].outputs[0]


# --- output kinds ----------------------------------------------------------------------------------------------


def test_cumulative() -> None:
    outputs = run(make(output_kind=CUMULATIVE), "abc")
    assert [o.outputs[0].text for o in outputs] == ["a", "ab", "abc"]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3]
    assert [o.finished for o in outputs] == [False, False, True]
    assert [o.outputs[0].finish_reason for o in outputs] == [None, None, "length"]
    assert {(o.request_id, o.prompt, tuple(o.prompt_token_ids)) for o in outputs} == {("r", "Q:", tuple(PROMPT))}


def test_earlier_outputs_do_not_change_later() -> None:
    outputs = run(make(output_kind=CUMULATIVE), "abc")
    assert outputs[0].outputs[0].token_ids == byte_ids(b"a")
    assert outputs[0].metrics is not None and outputs[0].metrics.num_generation_tokens == 1


def test_delta() -> None:
    outputs = run(make(output_kind=DELTA), "abc")
    assert [o.outputs[0].text for o in outputs] == ["a", "b", "c"]
    assert [o.outputs[0].token_ids for o in outputs] == [byte_ids(b"a"), byte_ids(b"b"), byte_ids(b"c")]


def test_final_only() -> None:
    outputs = run(make(output_kind=FINAL_ONLY), "abc")
    assert len(outputs) == 1 and outputs[0].finished
    assert only(outputs).text == "abc"


@pytest.mark.parametrize(
    ("kind", "texts"), [(DELTA, ["a", "bcd", "efg", "h"]), (CUMULATIVE, ["a", "abcd", "abcdefg", "abcdefgh"])]
)
def test_stream_interval(kind: RequestOutputKind, texts: list[str]) -> None:
    outputs = run(make(stream_interval=3, output_kind=kind), "abcdefgh")
    assert [o.outputs[0].text for o in outputs] == texts
    assert outputs[-1].finished


def test_no_character_is_torn_between_deltas() -> None:
    processor = make(output_kind=DELTA)
    texts = [only(step(processor, core([i]))).text for i in byte_ids("好!".encode())]
    assert texts == ["", "", "好", "!"]


def test_detokenize_off() -> None:
    output = only(run(make(detokenize=False), "a"))
    assert output.text == "" and output.token_ids == byte_ids(b"a")


# --- how it ends -----------------------------------------------------------------------------------------------


def test_engine_stops() -> None:
    output = only(step(make(), core([*byte_ids(b"hi"), 0], "stop")))
    assert (output.text, output.finish_reason, output.stop_reason) == ("hi", "stop", None)
    assert output.token_ids[-1] == 0
    output = only(step(make(stop_token_ids=[7]), core([*byte_ids(b"hi"), 7], "stop", stop_reason=7)))
    assert (output.text, output.stop_reason) == ("hi", 7)


def test_a_stop_string_aborts_the_request_in_the_engine() -> None:
    processor = make(stop=["lo"])
    result = processor.process_outputs([core("hello you")], 1.0)
    output = only(result.request_outputs)
    assert (output.text, output.finish_reason, output.stop_reason) == ("hel", "stop", "lo")
    assert result.reqs_to_abort == ["r"] and result.request_outputs[0].finished
    assert not processor.has_unfinished
    assert processor.process_outputs([core("more")], 2.0).request_outputs == []  # what was under way is dropped


def test_a_stop_string_in_the_last_step_needs_no_abort() -> None:
    result = make(stop=["lo"]).process_outputs([core("hello", "length")], 1.0)
    assert only(result.request_outputs).finish_reason == "stop"
    assert result.reqs_to_abort == []


def test_unknown_ids_are_dropped() -> None:
    assert step(make(), core("x", request_id="other")) == []


def test_ids_in_use_are_refused() -> None:
    processor = make()
    with pytest.raises(ValueError, match="request id 'r' is in use"):
        processor.add_request(make_request(), None)
    run(processor, "a")
    processor.add_request(make_request(), None)


def test_abort() -> None:
    processor = make(output_kind=FINAL_ONLY, stop=["xyz"])
    step(processor, core("abc", num_cached_tokens=1), core(byte_ids("你".encode())[:1], num_cached_tokens=1), now=1.0)
    result = processor.abort(["r", "r", "unknown"], 2.0)
    assert result.reqs_to_abort == ["r"]
    output = only(result.request_outputs)
    assert (output.text, output.finish_reason) == ("abc\ufffd", "abort")  # all that was held back comes out
    assert result.request_outputs[0].num_cached_tokens == 1
    assert not processor.has_unfinished
    assert processor.abort_requests(["r"]) == []


# --- logprobs --------------------------------------------------------------------------------------------------

A, B, C = byte_ids(b"abc")


def test_logprobs_hold_the_sampled_token_first() -> None:
    outside = TokenLogprobs([A, B, C], [-3.0, -0.5, -1.0], rank=9)  # sampled a; the top two are b and c
    inside = TokenLogprobs([C, B, C], [-1.0, -0.5, -1.0], rank=3)  # sampled c ties with another: its rank counts it
    output = only(step(make(logprobs=2), core([A, C], new_logprobs=[outside, inside])))
    assert output.logprobs is not None
    first, second = output.logprobs
    assert [(i, e.logprob, e.rank, e.decoded_token) for i, e in first.items()] == [
        (A, -3.0, 9, "a"), (B, -0.5, 1, "b"), (C, -1.0, 2, "c"),
    ]  # fmt: skip
    assert [(i, e.rank) for i, e in second.items()] == [(C, 2), (B, 1)]
    assert output.cumulative_logprob == -4.0


def test_zero_logprobs_hold_the_sampled_token_alone() -> None:
    output = only(step(make(logprobs=0), core([A], new_logprobs=[TokenLogprobs([A], [-3.0], rank=9)])))
    assert output.logprobs is not None and list(output.logprobs[0]) == [A]


def test_logprobs_that_nobody_asked_for() -> None:
    output = only(step(make(), core([A], new_logprobs=[TokenLogprobs([A], [-3.0], rank=9)])))
    assert output.logprobs is None and output.cumulative_logprob is None


def test_delta_logprobs() -> None:
    processor = make(logprobs=0, output_kind=DELTA)
    outputs = [only(step(processor, core([i], new_logprobs=[TokenLogprobs([i], [-1.0], 1)]))) for i in (A, B)]
    assert [[list(p) for p in o.logprobs or []] for o in outputs] == [[[A]], [[B]]]
    assert [o.cumulative_logprob for o in outputs] == [-1.0, -2.0]


def test_logprobs_without_detokenising_have_no_text() -> None:
    processor = make(logprobs=0, detokenize=False)
    output = only(step(processor, core([A], new_logprobs=[TokenLogprobs([A], [-3.0], 1)])))
    assert output.logprobs is not None and output.logprobs[0][A].decoded_token is None


@pytest.mark.parametrize(
    ("kind", "present"), [(CUMULATIVE, [True, True]), (DELTA, [True, False]), (FINAL_ONLY, [True])]
)
def test_prompt_logprobs(kind: RequestOutputKind, present: list[bool]) -> None:
    processor = make(prompt_logprobs=1, output_kind=kind)
    entries = [TokenLogprobs([PROMPT[1], A], [-2.0, -0.1], rank=4)]
    outputs = step(processor, core("a", prompt_logprobs=entries)) + step(processor, core("b", "length"))
    assert [o.prompt_logprobs is not None for o in outputs] == present
    prompt_logprobs = outputs[0].prompt_logprobs
    assert prompt_logprobs is not None and prompt_logprobs[0] is None
    assert prompt_logprobs[1] is not None and list(prompt_logprobs[1]) == [PROMPT[1], A]


# --- timing ----------------------------------------------------------------------------------------------------


def test_metrics() -> None:
    processor = make()  # arrives at 100
    times = RequestTimes(arrival=100, queued=101, scheduled=103, first_token=106, last_token=106)
    first = step(processor, core("a", times=times, num_cached_tokens=1), now=106.5)[0]
    assert first.metrics is not None and first.num_cached_tokens == 1
    assert (first.metrics.queue_time, first.metrics.prefill_time, first.metrics.time_to_first_token) == (2, 3, 6)
    assert (first.metrics.decode_time, first.metrics.time_per_output_token, first.metrics.e2e_latency) == (0, 0, None)
    times.last_token = 108
    step(processor, core("b", times=times), now=108.5)
    times.last_token = 112
    last = step(processor, core("cd", "length", times=times), now=113)[0].metrics  # two tokens in one step
    assert last is not None
    assert (last.time_to_first_token, last.decode_time, last.inference_time, last.e2e_latency) == (6, 6, 9, 13)
    assert last.inter_token_latencies == [2, 4]
    assert (last.num_generation_tokens, last.time_per_output_token, last.arrival_time) == (4, 2, 100)
    assert first.metrics.inter_token_latencies == []


def test_metrics_without_the_cores_times() -> None:
    processor = make()
    step(processor, core("a"), now=102)
    metrics = step(processor, core("b", "length"), now=105)[0].metrics
    assert metrics is not None
    assert (metrics.time_to_first_token, metrics.inter_token_latencies, metrics.e2e_latency) == (2, [3], 5)
    assert (metrics.queue_time, metrics.prefill_time) == (None, None)


# --- n > 1 -----------------------------------------------------------------------------------------------------


def make_parent(n: int = 2, seed: int = 5, **params: Any) -> tuple[OutputProcessor, list[Request]]:
    processor = OutputProcessor(byte_level())
    parent = ParentRequest(make_request("p", seed=seed, n=n, **params))
    children = parent.children()
    for index, child in enumerate(children):
        processor.add_request(child, "Q:", parent, index)
    return processor, children


def test_children() -> None:
    request = make_request("p", seed=7, n=3, prompt_logprobs=2)
    request.cache_salt, request.priority, request.bad_words_token_ids = "s", 4, [[9]]
    request.sampling_params = request.sampling_params.replace(seed=7)
    children = ParentRequest(request).children()
    assert [child.request_id for child in children] == ["0_p", "1_p", "2_p"]
    assert [child.seed for child in children] == [7, 8, 9] == [child.sampling_params.seed for child in children]
    assert {child.sampling_params.n for child in children} == {1}
    assert {(c.cache_salt, c.priority, c.arrival_time, c.eos_token_id, c.max_tokens) for c in children} == {
        ("s", 4, 100.0, 0, 50)
    }
    assert all(child.bad_words_token_ids == [[9]] and child.prompt_token_ids == PROMPT for child in children)
    assert [child.sampling_params.prompt_logprobs for child in children] == [2, None, None]


@pytest.mark.parametrize("seed", [2**63 - 1, -1])
def test_seeds_of_children_stay_in_range(seed: int) -> None:
    request = make_request("p", seed=seed, n=2)
    request.sampling_params = request.sampling_params.replace(seed=None if seed == -1 else seed)
    seeds = [child.seed for child in ParentRequest(request).children()]
    assert len(set(seeds)) == 2 and all(-(2**63) <= s < 2**63 for s in seeds)


def test_final_only_waits_for_all_and_keeps_the_order() -> None:
    processor, _ = make_parent(3, output_kind=FINAL_ONLY)
    assert step(processor, core("c", "length", "2_p"), core("a", None, "0_p")) == []
    assert step(processor, core("A", "length", "0_p")) == []
    (output,) = step(processor, core("b", "stop", "1_p"))
    assert (output.request_id, output.finished) == ("p", True)
    assert [(c.index, c.text, c.finish_reason) for c in output.outputs] == [
        (0, "aA", "length"), (1, "", "stop"), (2, "c", "length"),
    ]  # fmt: skip
    assert output.metrics is not None and output.metrics.num_generation_tokens == 4
    assert not processor.has_unfinished and not processor.parents


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_streaming_passes_each_child_on(kind: RequestOutputKind) -> None:
    processor, _ = make_parent(2, output_kind=kind)
    outputs = step(processor, core("a", None, "0_p"), core("b", "length", "1_p"))
    assert [(o.request_id, o.outputs[0].index, o.finished) for o in outputs] == [("p", 0, False), ("p", 1, False)]
    (output,) = step(processor, core("c", "length", "0_p"))
    assert output.finished and output.outputs[0].text == ("ac" if kind is CUMULATIVE else "c")


def test_prompt_logprobs_of_all_children_are_child_0s() -> None:
    entries = [TokenLogprobs([PROMPT[1]], [-2.0], rank=4)]
    processor, _ = make_parent(2, prompt_logprobs=0, output_kind=FINAL_ONLY)
    step(processor, core("a", "length", "0_p", prompt_logprobs=entries, num_cached_tokens=0))
    (output,) = step(processor, core("b", "length", "1_p", num_cached_tokens=1))
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 2
    assert output.num_cached_tokens == 0  # child 1 found what child 0 had cached; the request itself found nothing


def test_metrics_of_the_whole() -> None:
    processor, _ = make_parent(2, output_kind=FINAL_ONLY)
    for child, start in (("0_p", 104), ("1_p", 103)):
        times = RequestTimes(arrival=100, queued=100, scheduled=102, first_token=start, last_token=start)
        step(processor, core("a", None, child, times=times))
    step(processor, core("b", "length", "0_p", times=RequestTimes(100, 100, 102, 104, 105)), now=105)
    (output,) = step(processor, core("b", "length", "1_p", times=RequestTimes(100, 100, 102, 103, 109)), now=109)
    metrics = output.metrics
    assert metrics is not None
    assert (metrics.time_to_first_token, metrics.decode_time, metrics.e2e_latency) == (3, 6, 9)
    assert sorted(metrics.inter_token_latencies) == [1, 6] and metrics.num_generation_tokens == 4


def test_aborting_the_parent_aborts_the_children_that_run() -> None:
    processor, _ = make_parent(3, output_kind=FINAL_ONLY)
    step(processor, core("a", "length", "0_p"), core("b", None, "2_p"))
    result = processor.abort(["p"], 1.0)
    assert result.reqs_to_abort == ["1_p", "2_p"]
    (output,) = result.request_outputs
    assert [(c.text, c.finish_reason) for c in output.outputs] == [("a", "length"), ("", "abort"), ("b", "abort")]
    assert not processor.has_unfinished and not processor.parents


def test_ids_of_parents_and_children_are_in_use() -> None:
    processor, _ = make_parent(2)
    for name in ("p", "1_p"):
        with pytest.raises(ValueError, match=f"request id '{name}' is in use"):
            processor.add_request(make_request(name), None)
    other = OutputProcessor(byte_level())
    other.add_request(make_request("1_p"), None)
    parent = ParentRequest(make_request("p", n=2))
    child = parent.children()[0]
    with pytest.raises(ValueError, match="'1_p' is in use"):  # at the first child: nothing is half added
        other.add_request(child, None, parent, 0)
    assert other.num_unfinished == 1
