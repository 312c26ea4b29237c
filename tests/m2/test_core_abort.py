"""Abort at every moment of a request's life: nothing leaks, nobody else notices (R2.18 to R2.21)."""

import pytest

from folovllm.engine.core import EngineCore
from folovllm.executor.fake import fake_tokens
from folovllm.request import Request, RequestStatus
from tests import core_helpers as helpers
from tests.core_helpers import make_core, make_request

pytestmark = pytest.mark.m2


def two_in_a_small_pool() -> tuple[EngineCore, Request, Request]:
    """4 usable blocks of 4. In step 2 b needs a third block, finds none and is preempted; a goes on."""
    core = make_core(num_kv_blocks=5)
    a, b = make_request("a", 7, max_tokens=5), make_request("b", 8, max_tokens=5)
    helpers.add_all(core, [a, b])
    return core, a, b


def finish_and_check(core: EngineCore, aborted: Request, survivor: Request) -> None:
    """`aborted` is gone at once; `survivor` gets exactly its tokens; the worker hears of both, once each."""
    assert aborted.status == RequestStatus.FINISHED_ABORTED
    core.scheduler.check_integrity()
    heard: list[str] = []
    while core.scheduler.has_requests():
        heard += sorted(helpers.schedule_and_run(core).finished_req_ids)
    assert sorted(heard) == sorted([aborted.request_id, survivor.request_id])
    assert survivor.output_token_ids == fake_tokens(survivor.prompt_token_ids, survivor.max_tokens)
    helpers.assert_nothing_leaked(core)
    assert helpers.worker_requests(core) == []


def test_abort_while_waiting() -> None:
    core, a, b = two_in_a_small_pool()
    core.abort_requests(["b"])
    finish_and_check(core, b, a)


def test_abort_while_running() -> None:
    core, a, b = two_in_a_small_pool()
    core.step()
    core.abort_requests(["a"])
    assert helpers.block_ids(core, "a") == []
    finish_and_check(core, a, b)


def test_abort_while_preempted() -> None:
    core, a, b = two_in_a_small_pool()
    core.step()
    assert helpers.schedule_and_run(core).preempted_req_ids == {"b"}
    assert b.status == RequestStatus.PREEMPTED
    core.abort_requests(["b"])
    assert len(core.scheduler.waiting) == 0
    finish_and_check(core, b, a)


def test_abort_of_a_resumed_request() -> None:
    core, a, b = two_in_a_small_pool()
    while b.num_preemptions == 0 or b.status == RequestStatus.PREEMPTED:
        core.step()
    assert b.status == RequestStatus.RUNNING and a.is_finished
    core.abort_requests(["b"])
    helpers.drive(core)
    helpers.assert_nothing_leaked(core)


def test_abort_in_mid_prompt() -> None:
    core = make_core(max_num_batched_tokens=4, enable_chunked_prefill=True)
    a, b = make_request("a", 10, max_tokens=3), make_request("b", 3, max_tokens=3)
    helpers.add_all(core, [a, b])
    core.step()
    assert a.num_computed_tokens == 4
    core.abort_requests(["a"])
    finish_and_check(core, a, b)


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("moment", ["before execute", "before sample", "before update"])
def test_abort_between_schedule_and_update(moment: str, steps_before: int) -> None:
    core, a, b = two_in_a_small_pool()
    for _ in range(steps_before):
        core.step()
    scheduler_output = core.scheduler.schedule()
    if moment == "before execute":
        core.abort_requests(["a"])
    handle = core.executor.execute(scheduler_output)
    if moment == "before sample":
        core.abort_requests(["a"])
    runner_output = core.executor.sample(handle)
    if moment == "before update":
        core.abort_requests(["a"])
    outputs = core.scheduler.update_from_output(scheduler_output, runner_output)
    assert "a" not in {output.request_id for output in outputs}
    assert a.num_output_tokens == steps_before
    finish_and_check(core, a, b)


def test_an_id_that_comes_back_between_schedule_and_update() -> None:
    """The token on its way belongs to the aborted request, not to the new one of the same name."""
    core = make_core()
    core.add_request(make_request("a", [1, 2, 3], max_tokens=4))
    scheduler_output = core.scheduler.schedule()
    runner_output = core.executor.sample(core.executor.execute(scheduler_output))
    core.abort_requests(["a"])
    again = make_request("a", [7, 8, 9, 10], max_tokens=2)
    core.add_request(again)
    assert core.scheduler.update_from_output(scheduler_output, runner_output) == []
    helpers.drive(core)
    assert again.output_token_ids == fake_tokens([7, 8, 9, 10], 2)


def test_an_id_that_comes_back_before_the_worker_heard_of_the_abort() -> None:
    core = make_core()
    core.add_request(make_request("a", [1, 2, 3], max_tokens=4))
    core.step()
    core.abort_requests(["a"])
    core.add_request(make_request("a", [7, 8], max_tokens=3))
    assert helpers.tokens_of(helpers.drive(core)["a"]) == fake_tokens([7, 8], 3)


def test_abort_of_a_request_preempted_while_its_token_was_on_its_way() -> None:
    """A pipelined engine: step 2 is scheduled before step 1 is back, and takes b's blocks for a's next chunk."""
    core, a, b = pipelined_preemption(b_max_tokens=5)
    core.abort_requests(["b"])
    assert b.num_output_tokens == 2 and len(core.scheduler.waiting) == 0
    helpers.drive(core)
    assert a.output_token_ids == fake_tokens(a.prompt_token_ids, 2)
    helpers.assert_nothing_leaked(core)


def test_a_preempted_request_still_gets_the_token_on_its_way() -> None:
    core, a, b = pipelined_preemption(b_max_tokens=3)
    assert b.status == RequestStatus.PREEMPTED and b.num_output_tokens == 2
    helpers.drive(core)
    for request, n in ((a, 2), (b, 3)):
        assert request.output_token_ids == fake_tokens(request.prompt_token_ids, n)
    helpers.assert_nothing_leaked(core)


def test_a_preempted_request_can_finish_with_the_token_on_its_way() -> None:
    core, _, b = pipelined_preemption(b_max_tokens=2)
    assert b.status == RequestStatus.FINISHED_LENGTH_CAPPED and len(core.scheduler.waiting) == 0
    core.scheduler.check_integrity()
    assert b.output_token_ids == fake_tokens(b.prompt_token_ids, 2)
    helpers.drive(core)
    helpers.assert_nothing_leaked(core)


def pipelined_preemption(b_max_tokens: int) -> tuple[EngineCore, Request, Request]:
    """After two steps scheduled back to back: a (in mid-prompt, 4 per step) has preempted b, whose 2nd token came."""
    core = make_core(
        num_kv_blocks=5, max_num_batched_tokens=8, enable_chunked_prefill=True, long_prefill_token_threshold=4,
        reserve_full_sequence=False,
    )  # fmt: skip
    a, b = make_request("a", 14, max_tokens=2), make_request("b", 4, max_tokens=b_max_tokens)
    helpers.add_all(core, [a, b])
    core.step()  # a: positions 0-3 in block 1; b: all of its prompt in block 2
    assert (a.num_computed_tokens, b.num_output_tokens) == (4, 1)
    in_flight = [core.scheduler.schedule(), core.scheduler.schedule()]
    assert [dict(step.num_scheduled_tokens) for step in in_flight] == [{"a": 4, "b": 1}, {"a": 4}]
    assert in_flight[1].preempted_req_ids == {"b"}
    for step in in_flight:
        core.scheduler.update_from_output(step, core.executor.sample(core.executor.execute(step)))
    return core, a, b


def test_unknown_and_repeated_ids_are_ignored() -> None:
    core, _, b = two_in_a_small_pool()
    core.abort_requests(["nobody"])
    core.abort_requests(["b", "b", "nobody"])
    core.abort_requests(["b"])
    assert b.status == RequestStatus.FINISHED_ABORTED
    helpers.drive(core)
    core.abort_requests(["a"])  # finished by itself
    helpers.assert_nothing_leaked(core)


def test_abort_of_everybody() -> None:
    core = make_core(num_kv_blocks=9, max_num_seqs=3)
    requests = [make_request(f"r{i}", 5, max_tokens=9) for i in range(6)]
    helpers.add_all(core, requests)
    core.step()
    core.abort_requests(request.request_id for request in requests)
    assert not core.has_unfinished_requests() and core.scheduler.has_requests()
    core.step()
    assert helpers.worker_requests(core) == [] and core.step() == []
    helpers.assert_nothing_leaked(core)


def test_blocks_of_several_aborts_come_back_in_the_order_asked_for() -> None:
    """The same in every run: a set of ids would free in the order of Python's randomised string hashes."""
    core = make_core(num_kv_blocks=17)
    names = ["kiwi", "fig", "plum", "pear", "lime", "date"]
    helpers.add_all(core, [make_request(name, 4) for name in names])
    core.step()  # blocks 1..6 in order of arrival
    core.abort_requests(names)
    assert helpers.free_ids(core)[:6] == [6, 5, 4, 3, 2, 1]
