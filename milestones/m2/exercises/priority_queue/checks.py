"""Checks of m2/priority_queue: the order, removal, the number of comparisons, and the queue inside the toy engine."""

import random
from typing import Any

from folovllm.core.sched.request_queue import RequestQueue
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import check_workload
from folovllm.learn.toy_engine import add_all, make_core, make_request, random_workload, schedule_and_run
from folovllm.request import Request


def request(request_id: str, priority: int = 0, arrival_time: float = 0.0) -> Request:
    return make_request(request_id, 1, max_tokens=1, priority=priority, arrival_time=arrival_time)


def queue_of(mine: Mine, *requests: Request) -> RequestQueue:
    queue: RequestQueue = mine.cls()
    for r in requests:
        queue.add_request(r)
    return queue


def pop_all(queue: RequestQueue) -> list[str]:
    return [queue.pop_request().request_id for _ in range(len(queue))]


def prediction() -> str:
    core = make_core(scheduling_policy="priority", max_num_seqs=1)
    add_all(core, [request("b", 1), request("a", 1), request("z", -1), request("c", 0)])
    return ", ".join(request_id for _ in range(4) for request_id in schedule_and_run(core).num_scheduled_tokens)


@check("unit", spec="R2.9")
def the_smallest_number_is_the_head(mine: Mine) -> None:
    """The request with the lowest priority value is peeked at and popped first."""
    queue = queue_of(mine, request("low", 5), request("top", -3), request("middle", 1))
    head = queue.peek_request().request_id
    assert head == "top", (
        f"priorities low 5, top -3, middle 1: the head is {head}, expected top: a lower number is more urgent"
    )
    assert len(queue) == 3, f"peek_request left {len(queue)} of 3 requests in the queue: it only looks"
    got = pop_all(queue)
    assert got == ["top", "middle", "low"], f"they were popped in the order {got}, expected top, middle, low"


@check("unit", spec="R2.9", hint=2)
def ties_go_by_arrival_and_then_by_id(mine: Mine) -> None:
    """Among requests of the same priority the earlier arrival goes first, and the smaller id if that is equal too."""
    queue = queue_of(mine, request("late", 1, 9.0), request("z", 1, 2.0), request("y", 1, 2.0), request("x", 1, 4.0))
    got = pop_all(queue)
    assert got == ["y", "z", "x", "late"], (
        f"all have priority 1, the arrivals are late 9, z 2, y 2, x 4, and they were popped in the order {got}, "
        "expected y, z, x, late: without the arrival an early request can wait forever behind its equals"
    )


@check("unit", spec="R2.9")
def a_preempted_request_stands_by_its_rank(mine: Mine) -> None:
    """`prepend_request` puts a request where its rank belongs, not in front of more urgent ones."""
    queue = queue_of(mine, request("a", 1), request("b", 3))
    queue.prepend_request(request("c", 2))
    got = pop_all(queue)
    assert got == ["a", "c", "b"], (
        f"c (priority 2) was prepended to a (1) and b (3); popped were {got}, expected a, c, b"
    )


@check("unit", spec="R2.10")
def an_empty_queue_has_no_head(mine: Mine) -> None:
    """peek_request and pop_request raise IndexError if no request waits."""
    queue = queue_of(mine)
    assert len(queue) == 0, f"a new queue has length {len(queue)}, expected 0"
    for method in (queue.peek_request, queue.pop_request):
        try:
            got: Any = method()
        except IndexError:
            continue
        raise AssertionError(f"{method.__name__}() of an empty queue returned {got!r}, expected an IndexError")


@check("unit", spec="R2.10", hint=3)
def removal_keeps_the_order_of_the_rest(mine: Mine) -> None:
    """Taking requests out leaves the others in order."""
    requests = [request(f"r{priority}", priority) for priority in (3, 4, 0, 2, 1)]
    queue = queue_of(mine, *requests)
    queue.remove_requests([requests[2], request("stranger")])
    got = pop_all(queue)
    assert got == ["r1", "r2", "r3", "r4"], (
        f"r3, r4, r0, r2, r1 were added, r0 was taken out, and popped were {got}: a heap with a hole in it is no "
        "heap any more"
    )


@check("unit", spec="R2.10", hint=3)
def removal_goes_by_object_not_by_id(mine: Mine) -> None:
    """An aborted request and a new one with its id are two requests."""
    old, new = request("r1"), request("r1")
    queue = queue_of(mine, new)
    queue.remove_requests([old])
    assert len(queue) == 1, (
        "an old request r1 was removed and a new one with the same id was taken out of the queue: its client would "
        "wait forever"
    )
    queue.remove_requests([new])
    assert len(queue) == 0, "r1 was removed and is still there"


@check("unit", spec="R2.10", hint=2)
def iterating_yields_the_order_and_changes_nothing(mine: Mine) -> None:
    """Going through the queue gives the order of popping, as often as one likes."""
    queue = queue_of(mine, *(request(f"r{priority}", priority) for priority in (3, 1, 4, 0, 5, 2)))
    expected = ["r0", "r1", "r2", "r3", "r4", "r5"]
    for attempt in ("first", "second"):
        got = [r.request_id for r in queue]
        assert got == expected, (
            f"the {attempt} iteration yielded {got}, expected {expected}: the list of a heap is not sorted, and "
            "iterating must take nothing out"
        )


@check("property", spec="R2.10", hint=3)
def random_operations_equal_those_of_a_sorted_list(mine: Mine) -> None:
    """Any sequence of add, pop and remove leaves what a sorted list holds."""
    for length, num_seeds in ((5, 200), (8, 200), (12, 100), (20, 50), (80, 10), (320, 5)):
        for seed in range(num_seeds):  # many short sequences first: a failure is then easy to follow by hand
            _play(mine.cls(), random.Random(seed), length)


def _play(queue: RequestQueue, rng: random.Random, length: int) -> None:
    model: list[Request] = []
    played: list[str] = []
    for i in range(length):
        action = rng.random()
        if action < 0.5 or not model:
            new = request(f"r{i}", rng.randint(0, 3), rng.randint(0, 3))
            queue.add_request(new)
            model = sorted([*model, new])
            played.append(f"add {new.request_id} {new.sort_key()[:2]}")
        elif action < 0.8:
            got, expected = queue.pop_request(), model.pop(0)
            played.append("pop")
            assert got is expected, f"{', '.join(played)} returned {got.request_id}, expected {expected.request_id}"
        else:
            gone = rng.sample(model, rng.randint(0, min(3, len(model))))
            queue.remove_requests(gone)
            model = [r for r in model if r not in gone]
            played.append(f"remove {[r.request_id for r in gone]}")
        order = [r.request_id for r in queue]
        assert order == [r.request_id for r in model] and len(queue) == len(model), (
            f"after {', '.join(played)} the queue holds {order} and has length {len(queue)}, expected "
            f"{[r.request_id for r in model]}"
        )


@check("trace", spec="R2.9", hint=2)
def same_decisions_as_the_reference(mine: Mine) -> None:
    """On 24 random workloads under "priority", with preemptions and aborts, every step decides what the reference
    decides.
    """
    for seed in range(24):
        milestone = ("m2", "m3", "m5", "m6")[seed % 4]
        check_workload(random_workload(seed, milestone, with_aborts=True, scheduling_policy="priority"), mine.parts)


class CountingRequest(Request):
    """Counts how often its rank is asked for."""

    asked = 0

    def sort_key(self) -> tuple[int, float, str]:
        CountingRequest.asked += 1
        return super().sort_key()


@check("counters", spec="R2.10", hint=1)
def adding_and_popping_take_few_comparisons(mine: Mine) -> None:
    """500 requests are added and popped with O(log n) comparisons each."""
    rng, count = random.Random(0), 500
    params = request("params").sampling_params
    requests = [CountingRequest(f"r{i}", [1], params, priority=rng.randint(0, 9), arrival_time=i) for i in range(count)]
    CountingRequest.asked = 0
    pop_all(queue_of(mine, *requests))
    limit = 100 * count  # a comparison asks for two keys, and a heap makes about 2 * log2(500) = 18 per pop
    assert CountingRequest.asked <= limit, (
        f"adding and popping {count:,} requests asked {CountingRequest.asked:,} times for a sort_key, expected at "
        f"most {limit:,}: looking through the whole queue for each request makes a long queue slow"
    )
