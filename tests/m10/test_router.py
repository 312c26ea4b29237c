"""The router: prefixes stay together, loads stay even, and a replica that does not live is never chosen."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.engine.router import (
    MAX_LEAD,
    KnownBlocks,
    LeastLoadedRouter,
    PrefixRouter,
    RandomRouter,
    ReplicaLoad,
    RoundRobinRouter,
    Router,
)
from folovllm.parts import PARTS, load_part
from folovllm.request import Request
from tests.core_helpers import make_request

pytestmark = pytest.mark.m10

ROUTERS: list[type[Router]] = [PrefixRouter, LeastLoadedRouter, RoundRobinRouter, RandomRouter]


def loads(*counts: int) -> list[ReplicaLoad]:
    return [ReplicaLoad(replica, count) for replica, count in enumerate(counts)]


def prompt_of(topic: int, own: int, length: int = 24) -> list[int]:
    """16 tokens of the topic, and then some of its own."""
    return [topic] * 16 + [500 + own] * (length - 16)


def request_of(topic: int, own: int, **args: object) -> Request:
    return make_request(f"r{topic}-{own}", prompt_of(topic, own), **args)


def test_the_default_is_the_router_by_prefix() -> None:
    assert load_part("serve.router") is PrefixRouter
    assert all(callable(getattr(cls, name)) for cls in ROUTERS for name in PARTS["serve.router"].methods)


@pytest.mark.parametrize("router_class", ROUTERS)
@given(data=st.data())
def test_only_a_replica_that_is_offered_is_chosen(router_class: type[Router], data: st.DataObject) -> None:
    router = router_class(5, 4, 100)
    for i in range(data.draw(st.integers(1, 20))):
        living = data.draw(st.lists(st.integers(0, 4), min_size=1, unique=True))
        offered = [ReplicaLoad(replica, data.draw(st.integers(0, 9))) for replica in living]
        request = request_of(data.draw(st.integers(0, 2)), i)
        chosen = router.route(request, offered)
        assert chosen in living
        router.started(request, chosen)
        if data.draw(st.booleans()):
            router.finished(request, chosen, [1, 2, 3])
        if data.draw(st.booleans()):
            router.forget(chosen)


def test_round_robin_skips_the_dead() -> None:
    router, order = RoundRobinRouter(3, 4, 0), []
    for i in range(6):
        offered = [load for load in loads(0, 0, 0) if i < 3 or load.replica != 1]
        order.append(router.route(request_of(0, i), offered))
        router.started(request_of(0, i), order[-1])
    assert order == [0, 1, 2, 0, 2, 0]


def test_random_reaches_all_and_can_be_repeated() -> None:
    first, second = RandomRouter(4, 4, 0), RandomRouter(4, 4, 0)
    order = [first.route(request_of(0, i), loads(0, 0, 0, 0)) for i in range(100)]
    assert set(order) == {0, 1, 2, 3}
    assert order == [second.route(request_of(0, i), loads(0, 0, 0, 0)) for i in range(100)]


def test_the_least_loaded_has_the_fewest_requests_then_the_fewest_tokens_then_the_longest_rest() -> None:
    router = LeastLoadedRouter(3, 4, 0)
    request = request_of(0, 0)
    assert router.route(request, loads(2, 1, 3)) == 1
    assert router.route(request, [ReplicaLoad(0, 1, 900), ReplicaLoad(1, 1, 20), ReplicaLoad(2, 2, 0)]) == 1
    order = []
    for _ in range(6):
        order.append(router.route(request, loads(0, 0, 0)))
        router.started(request, order[-1])
    assert order == [0, 1, 2, 0, 1, 2]


def test_a_known_prefix_is_worth_a_little_load_and_no_more() -> None:
    router = PrefixRouter(2, 4, 100)
    router.started(request_of(7, 0), 1)
    assert router.route(request_of(7, 1), loads(0, 0)) == 1
    assert router.route(request_of(7, 1), loads(0, MAX_LEAD)) == 1
    assert router.route(request_of(7, 1), loads(0, MAX_LEAD + 1)) == 0
    assert router.route(request_of(8, 1), loads(0, 1)) == 0, "an unknown prefix goes to the least loaded"


def test_the_longest_prefix_wins_and_the_load_decides_between_equal_ones() -> None:
    router = PrefixRouter(3, 4, 100)
    router.started(make_request("short", prompt_of(7, 0)[:8]), 0)
    router.started(make_request("long", prompt_of(7, 0)), 1)
    assert router.route(request_of(7, 1), loads(0, 2, 0)) == 1
    router.started(make_request("again", prompt_of(7, 2)), 2)
    assert router.route(request_of(7, 1), loads(0, 2, 1)) == 2


def test_a_conversation_comes_back_to_the_replica_that_has_its_last_answer() -> None:
    """The blocks of the answer count, but for a block that the last token fills: it was never computed."""
    router = PrefixRouter(2, 4, 100)
    first, answer = make_request("turn 1", [1, 2, 3, 4, 5, 6]), [7, 8, 9, 10, 11, 12]
    router.started(first, 1)
    router.finished(first, 1, answer)
    assert router.known[1].match(router.block_names(make_request("turn 2", [1, 2, 3, 4, 5, 6, *answer, 13]))) == 2
    router.finished(first, 1, [*answer, 13])
    assert router.known[1].match(router.block_names(make_request("turn 2", [1, 2, 3, 4, 5, 6, *answer, 13]))) == 3


def test_a_salt_keeps_equal_prompts_apart() -> None:
    router = PrefixRouter(2, 4, 100)
    router.started(request_of(7, 0, cache_salt="tenant a"), 1)
    assert router.route(request_of(7, 0, cache_salt="tenant b"), loads(0, 0)) == 0
    assert router.route(request_of(7, 0, cache_salt="tenant a"), loads(0, 0)) == 1


def test_what_a_replica_has_lost_is_no_reason_to_choose_it() -> None:
    router = PrefixRouter(2, 4, 100)
    router.started(request_of(7, 0), 1)
    router.forget(1)
    assert router.route(request_of(7, 1), loads(0, 0)) == 0


def test_without_a_prefix_cache_the_router_goes_by_load_alone() -> None:
    router = PrefixRouter(2, 4, 0)
    router.started(request_of(7, 0), 1)
    assert router.block_names(request_of(7, 0)) == []
    assert router.route(request_of(7, 1), loads(0, 0)) == 0


def test_the_request_s_own_block_names_are_left_alone() -> None:
    """They belong to the engine. In thread mode it is the same object."""
    request = request_of(7, 0)
    router = PrefixRouter(2, 4, 100)
    router.route(request, loads(0, 0))
    router.started(request, 0)
    assert request.block_hashes == [] and request.block_tokens == []


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning() -> None:
    known = KnownBlocks(4)
    known.add([b"a", b"b", b"c"])
    known.add([b"x", b"y"])
    assert len(known) == 4
    assert known.match([b"a", b"b", b"c"]) == 2 and known.match([b"x", b"y"]) == 2
    known.add([b"a"])
    known.add([b"z"])
    assert known.match([b"a"]) == 1 and known.match([b"a", b"b"]) == 1


def test_prefixes_stay_together_and_loads_even() -> None:
    """64 topics with 8 requests each, in any order, at most 16 at a time on 4 replicas."""
    router, rng = PrefixRouter(4, 4, 10_000), random.Random(1)
    todo = [(topic, own) for topic in range(64) for own in range(8)]
    rng.shuffle(todo)
    counts, running, places = [0] * 4, list[tuple[Request, int]](), dict[int, Counter[int]]()
    for topic, own in todo:
        if len(running) == 16:
            ended, replica = running.pop(rng.randrange(16))
            counts[replica] -= 1
            router.finished(ended, replica, [1])
        request = request_of(topic, own)
        replica = router.route(request, loads(*counts))
        assert counts[replica] <= min(counts) + MAX_LEAD
        router.started(request, replica)
        counts[replica] += 1
        running.append((request, replica))
        places.setdefault(topic, Counter())[replica] += 1
    together = sum(max(where.values()) for where in places.values())
    assert together > 0.8 * len(todo), "a random router gives about 0.45"


def test_a_popular_prefix_spreads_by_itself() -> None:
    """All requests have the same prefix: it must not end in one queue."""
    router, counts = PrefixRouter(4, 4, 100), [0] * 4
    for own in range(40):
        replica = router.route(request_of(7, own), loads(*counts))
        router.started(request_of(7, own), replica)
        counts[replica] += 1
    assert max(counts) - min(counts) <= MAX_LEAD + 1
