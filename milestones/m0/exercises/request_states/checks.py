"""The checks of m0/request_states: every pair of states, random walks, and real schedules."""

import random
from typing import Any

from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import drive, make_core
from folovllm.request import Request, RequestStatus
from folovllm.sampling_params import SamplingParams

S = RequestStatus
ALIVE = (S.WAITING, S.RUNNING, S.PREEMPTED)
FINISHED = tuple(status for status in S if S.is_finished(status))
BETWEEN_ALIVE = {
    (S.WAITING, S.RUNNING): "the scheduler admits it",
    (S.RUNNING, S.PREEMPTED): "there are no blocks left for it",
    (S.PREEMPTED, S.RUNNING): "the scheduler admits it again",
}


def make(cls: Any, request_id: str = "a", prompt_len: int = 3, max_tokens: int = 8) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return cls(request_id, list(range(prompt_len)), params)


def is_legal(before: RequestStatus, after: RequestStatus) -> bool:
    return (before, after) in BETWEEN_ALIVE or (before in ALIVE and after in FINISHED)


def moves(request: Request, after: RequestStatus) -> bool:
    """Tries a move and returns whether set_status allowed it."""
    try:
        request.set_status(after)
    except AssertionError:
        return False
    return True


def prediction() -> str:
    request, passed = make(Request), ["WAITING"]
    for status in (S.RUNNING, S.PREEMPTED, S.RUNNING, S.FINISHED_ABORTED):
        request.set_status(status)
        passed.append(request.status.name)
    refused = not moves(request, S.FINISHED_LENGTH_CAPPED)
    return (
        f"{' -> '.join(passed)}; {'refused' if refused else 'accepted'}\nset_status refuses a move with AssertionError."
    )


@check("unit", spec="R0.28", hint=1)
def legal_moves_are_made(mine: Mine) -> None:
    """The scheduler can admit a request, preempt it and admit it again."""
    for (before, after), when in BETWEEN_ALIVE.items():
        request = make(mine.cls)
        request.status = before
        assert moves(request, after), f"{before.name} -> {after.name} was refused, and it is legal: {when}"
        assert request.status == after, f"after {before.name} -> {after.name} the status is {request.status.name}"


@check("unit", spec="R0.29", hint=2)
def a_request_can_finish_from_every_living_state(mine: Mine) -> None:
    """A user can abort a request that still waits, and an error can end one that is preempted."""
    for before in ALIVE:
        for after in FINISHED:
            request = make(mine.cls)
            request.status = before
            assert moves(request, after), (
                f"{before.name} -> {after.name} was refused, and it is legal: an abort or an error may come at any "
                "time, and set_status does not ask which reasons fit a state"
            )
            assert request.status == after, f"after {before.name} -> {after.name} the status is {request.status.name}"


@check("unit", spec="R0.28", hint=2)
def a_finished_request_never_moves_again(mine: Mine) -> None:
    """A finished request has given its blocks back, so it can neither run again nor finish a second time."""
    for before in FINISHED:
        for after in S:
            request = make(mine.cls)
            request.status = before
            assert not moves(request, after), (
                f"{before.name} -> {after.name} was allowed: the request has given its blocks back and its user has "
                "the reason why it ended"
            )


@check("unit", spec="R0.28", hint=1)
def other_moves_between_living_states_are_refused(mine: Mine) -> None:
    """Nothing goes back to WAITING, nothing is preempted that does not run, and RUNNING -> RUNNING is no move."""
    for before in ALIVE:
        for after in ALIVE:
            if (before, after) in BETWEEN_ALIVE:
                continue
            request = make(mine.cls)
            request.status = before
            assert not moves(request, after), (
                f"{before.name} -> {after.name} was allowed: no step of the scheduler makes this move, so it is a bug "
                "that should be seen here and not as a leaked block"
            )


@check("unit", spec="R0.28", hint=3)
def a_refused_move_changes_nothing_and_names_itself(mine: Mine) -> None:
    """A refused move leaves the status as it was, and its message names the request and both states."""
    request = make(mine.cls, "chat-7")
    request.status = S.FINISHED_STOPPED
    try:
        request.set_status(S.RUNNING)
    except AssertionError as error:
        message = str(error)
    else:
        raise AssertionError("FINISHED_STOPPED -> RUNNING was allowed")
    assert request.status == S.FINISHED_STOPPED, (
        f"the refused move FINISHED_STOPPED -> RUNNING left the status {request.status.name}: the check comes first"
    )
    expected = "chat-7: FINISHED_STOPPED -> RUNNING"
    assert expected in message, f"the message is {message!r}, expected {expected!r}: a reader must find the request"


@check("property", spec="R0.28", hint=2)
def random_walks(mine: Mine) -> None:
    """In any sequence of attempted moves, exactly the legal ones happen."""
    rng = random.Random(0)
    for length in [n for n in range(1, 12) for _ in range(20)]:
        request, status, tried = make(mine.cls), S.WAITING, ["WAITING"]
        for after in rng.choices(list(S), k=length):
            tried.append(after.name)
            legal = is_legal(status, after)
            status = after if legal else status
            allowed = moves(request, after)
            assert (allowed, request.status) == (legal, status), (
                f"attempts {', '.join(tried)}: the last was {'allowed' if allowed else 'refused'} and the status is "
                f"{request.status.name}, expected {'allowed' if legal else 'refused'} and {status.name}"
            )


@check("trace", spec="R0.28", hint=1)
def requests_pass_the_states_that_the_scheduler_wants(mine: Mine) -> None:
    """On 20 tight schedules with preemptions, requests of your class run to their end as the engine's own do."""
    for seed in range(20):
        rng = random.Random(seed)
        sizes = [(rng.randint(1, 7), rng.randint(1, 8)) for _ in range(2 + seed // 2)]
        expected, got = run_schedule(mine.reference, sizes), run_schedule(mine.cls, sizes)
        assert got == expected, (
            f"requests of (prompt, output) {sizes} tokens with 5 blocks of 4: they ended as {got}, expected {expected}"
        )


def run_schedule(cls: Any, sizes: list[tuple[int, int]]) -> dict[str, tuple[str, int]]:
    """Runs requests with so few blocks that some are preempted. Returns the last state and the preemptions of each."""
    core = make_core(max_model_len=16, block_size=4, num_kv_blocks=6, max_num_seqs=4)
    requests = [make(cls, f"r{i}", *size) for i, size in enumerate(sizes)]
    for request in requests:
        core.add_request(request)
    drive(core)
    return {request.request_id: (request.status.name, request.num_preemptions) for request in requests}
