"""Request: the state machine (R0.28) and the order of the stop checks (R1.4)."""

import pytest

from folovllm.request import Request, RequestStatus, check_stop
from tests.core_helpers import make_request

pytestmark = pytest.mark.m1

S = RequestStatus
FINISHED = [S.FINISHED_STOPPED, S.FINISHED_LENGTH_CAPPED, S.FINISHED_ABORTED, S.FINISHED_ERROR]
LEGAL = {(S.WAITING, S.RUNNING), (S.RUNNING, S.PREEMPTED), (S.PREEMPTED, S.RUNNING)} | {
    (alive, finished) for alive in (S.WAITING, S.RUNNING, S.PREEMPTED) for finished in FINISHED
}


@pytest.mark.parametrize("before", list(S))
@pytest.mark.parametrize("after", list(S))
def test_every_transition_is_either_legal_or_refused(before: S, after: S) -> None:
    request = make_request("a", 3)
    request.status = before
    if (before, after) in LEGAL:
        request.set_status(after)
        assert request.status == after
    else:
        with pytest.raises(AssertionError, match=f"{before.name} -> {after.name}"):
            request.set_status(after)
        assert request.status == before


def test_finished_means_after_preempted() -> None:
    assert [status for status in S if S.is_finished(status)] == FINISHED
    reasons = [S.get_finished_reason(status) for status in S]
    assert reasons == [None, None, None, "stop", "length", "abort", "error"]


def test_counters() -> None:
    prompt = [5, 6, 7]
    request = Request("a", prompt, make_request("x", 1).sampling_params)
    request.append_output_token_id(8)
    counters = (request.num_prompt_tokens, request.num_tokens, request.num_output_tokens)
    assert counters == (3, 4, 1)
    assert request.all_token_ids == [5, 6, 7, 8] and prompt == [5, 6, 7], "the caller's list stays his"


def test_an_empty_prompt_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        make_request("a", [])


def test_priority_order_is_priority_then_arrival_then_id() -> None:
    late = make_request("a", 1, priority=0, arrival_time=2.0)
    early = make_request("c", 1, priority=0, arrival_time=1.0)
    same_time = make_request("b", 1, priority=0, arrival_time=2.0)
    urgent = make_request("d", 1, priority=-1, arrival_time=9.0)
    assert sorted([late, early, same_time, urgent]) == [urgent, early, late, same_time]


EOS, STOP, OTHER = 7, 8, 9
# max_model_len 10, prompt of 5: the context is full with the fifth output.
# outputs so far, last token, parameters -> (status, stop_reason) or None for "goes on"
STOP_CASES = [
    ("nothing to stop for", 1, OTHER, {}, None),
    ("EOS", 1, EOS, {}, (S.FINISHED_STOPPED, None)),
    ("EOS ignored", 1, EOS, {"ignore_eos": True}, None),
    ("stop id", 1, STOP, {"stop_token_ids": [3, STOP]}, (S.FINISHED_STOPPED, STOP)),
    ("stop id, EOS ignored", 1, STOP, {"stop_token_ids": [STOP], "ignore_eos": True}, (S.FINISHED_STOPPED, STOP)),
    ("EOS before stop ids", 1, EOS, {"stop_token_ids": [EOS]}, (S.FINISHED_STOPPED, None)),
    ("ignored EOS as stop id", 1, EOS, {"stop_token_ids": [EOS], "ignore_eos": True}, (S.FINISHED_STOPPED, EOS)),
    ("max_tokens", 2, OTHER, {"max_tokens": 2}, (S.FINISHED_LENGTH_CAPPED, None)),
    ("below max_tokens", 1, OTHER, {"max_tokens": 2}, None),
    ("EOS as the last allowed token", 2, EOS, {"max_tokens": 2}, (S.FINISHED_STOPPED, None)),
    ("stop id as the last allowed", 2, STOP, {"max_tokens": 2, "stop_token_ids": [STOP]}, (S.FINISHED_STOPPED, STOP)),
    ("min_tokens shields from EOS", 2, EOS, {"min_tokens": 3}, None),
    ("min_tokens shields from stop ids", 2, STOP, {"min_tokens": 3, "stop_token_ids": [STOP]}, None),
    ("min_tokens reached", 3, EOS, {"min_tokens": 3}, (S.FINISHED_STOPPED, None)),
    ("context full", 5, OTHER, {}, (S.FINISHED_LENGTH_CAPPED, None)),
    ("context one short of full", 4, OTHER, {}, None),
    ("full context beats EOS", 5, EOS, {}, (S.FINISHED_LENGTH_CAPPED, None)),
    ("full context beats min_tokens", 5, OTHER, {"min_tokens": 50}, (S.FINISHED_LENGTH_CAPPED, None)),
]


@pytest.mark.parametrize(("outputs", "last", "params", "verdict"), [c[1:] for c in STOP_CASES], ids=lambda *_: "")
def test_stop_order(outputs: int, last: int, params: dict, verdict: tuple | None) -> None:
    request = make_request("a", 5, eos_token_id=EOS, **({"max_tokens": 100} | params))
    request.set_status(S.RUNNING)
    for token_id in [OTHER] * (outputs - 1) + [last]:
        request.append_output_token_id(token_id)
    assert check_stop(request, max_model_len=10) == (verdict is not None)
    assert (request.status, request.stop_reason) == (verdict or (S.RUNNING, None))
