"""Request queues (R2.9, R2.10): order, ties, prepending, removal; each against a sorted list."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from folovllm.core.sched.request_queue import RequestQueue
from folovllm.parts import load_part, variants
from folovllm.request import Request
from tests.core_helpers import ids, make_request

pytestmark = pytest.mark.m2

POLICIES = variants("core.request_queue")
# By what each policy sorts the waiting requests. None: not at all, a preempted request goes to the front.
SORT_KEYS: dict[str, Callable[[Request], Any] | None] = {
    "fcfs": None,
    "priority": lambda r: (r.priority, r.arrival_time, r.request_id),
}


def queue_of(policy: str, *requests: Request) -> RequestQueue:
    queue: RequestQueue = load_part(f"core.request_queue.{policy}")()
    for request in requests:
        queue.add_request(request)
    return queue


def pop_all(queue: RequestQueue) -> list[str]:
    return [queue.pop_request().request_id for _ in range(len(queue))]


def request(request_id: str, priority: int = 0, arrival_time: float = 0.0, prompt: int = 1) -> Request:
    return make_request(request_id, prompt, priority=priority, arrival_time=arrival_time)


def test_fcfs_ignores_priority() -> None:
    queue = queue_of("fcfs", request("a", 5), request("b", 0), request("c", 3))
    assert queue.peek_request().request_id == "a" and len(queue) == 3
    assert ids(queue) == pop_all(queue) == ["a", "b", "c"]


def test_fcfs_prepend_goes_ahead_of_everybody() -> None:
    queue = queue_of("fcfs", request("a"), request("b"))
    queue.prepend_request(request("c"))
    queue.prepend_request(request("d"))
    assert pop_all(queue) == ["d", "c", "a", "b"]


def test_priority_lower_value_first_then_arrival_then_id() -> None:
    queue = queue_of(
        "priority", request("late", 1, 9.0), request("z", 1, 2.0), request("y", 1, 2.0), request("top", -3)
    )
    assert queue.peek_request().request_id == "top"
    assert ids(queue) == pop_all(queue) == ["top", "y", "z", "late"]


def test_priority_prepend_is_adding() -> None:
    queue = queue_of("priority", request("a", 1), request("b", 3))
    queue.prepend_request(request("c", 2))
    assert pop_all(queue) == ["a", "c", "b"]


@pytest.mark.parametrize("policy", POLICIES)
def test_remove_keeps_the_order_of_the_rest_and_ignores_strangers(policy: str) -> None:
    requests = [request(f"r{i}", priority=i) for i in range(6)]
    queue = queue_of(policy, *requests)
    queue.remove_requests([requests[0], requests[3], request("stranger"), request("r5")])  # another object named r5
    assert pop_all(queue) == ["r1", "r2", "r4", "r5"]
    assert len(queue) == 0 and not queue


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_queue_has_no_head(policy: str) -> None:
    queue = queue_of(policy)
    with pytest.raises(IndexError):
        queue.peek_request()
    with pytest.raises(IndexError):
        queue.pop_request()


@pytest.mark.parametrize("policy", POLICIES)
def test_random_operations_against_a_list(policy: str) -> None:
    rng, queue = random.Random(0), queue_of(policy)
    model: list[Request] = []
    key = SORT_KEYS[policy]
    for i in range(2_000):
        action = rng.random()
        if action < 0.5 or not model:
            new = request(f"r{i}", rng.randint(0, 3), rng.randint(0, 3), prompt=rng.randint(1, 4))
            if action < 0.1:
                queue.prepend_request(new)
                model.insert(0, new)
            else:
                queue.add_request(new)
                model.append(new)
        elif action < 0.8:
            assert queue.peek_request() is model[0]
            assert queue.pop_request() is model.pop(0)
        else:
            gone = rng.sample(model, rng.randint(0, min(3, len(model))))
            queue.remove_requests(gone)
            model = [r for r in model if r not in gone]
        if key is not None:
            model.sort(key=key)
        assert list(queue) == model and len(queue) == len(model)
