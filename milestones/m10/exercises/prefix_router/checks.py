"""The checks of m10/prefix_router: scenes of two and three replicas, any order of events, and simulated engines."""

import random
from typing import Any

from folovllm.engine.router import PrefixRouter, RandomRouter, ReplicaLoad
from folovllm.learn.check import Mine, check
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from folovllm.sim.simulate import simulate
from folovllm.sim.workloads import Recipe, follow_recipe

BLOCK = 4


def ask(prompt: list[int], name: str = "r", **args: Any) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=8), arrival_time=0.0, **args)


def tokens(start: int, count: int) -> list[int]:
    """E.g. tokens(100, 3) -> [100, 101, 102]."""
    return list(range(start, start + count))


def loads(*counts: int) -> list[ReplicaLoad]:
    """E.g. loads(2, 0): replica 0 has two requests, and replica 1 none."""
    return [ReplicaLoad(replica, count) for replica, count in enumerate(counts)]


def make(mine: Mine, num_replicas: int = 2, num_blocks: int = 64) -> Any:
    return mine.cls(num_replicas, BLOCK, num_blocks)


def same_prompt_ten_times(router: Any) -> list[int]:
    """How many of ten unfinished requests with one prompt each of three replicas has got."""
    counts = [0, 0, 0]
    for i in range(10):
        request = ask(tokens(0, 12), f"r{i}")
        replica = router.route(request, loads(*counts))
        router.started(request, replica)
        counts[replica] += 1
    return counts


def prediction() -> str:
    counts = sorted(same_prompt_ten_times(PrefixRouter(3, BLOCK, 64)), reverse=True)
    why = "The prompt spreads: a replica that is 5 ahead of the emptiest one is passed over"
    return f"{', '.join(map(str, counts))}\n{why}"


# ---- the prefix


@check("unit", spec="R10.1", hint=2)
def the_longest_prefix_decides(mine: Mine) -> None:
    """Of two replicas that know a part of the prompt, the one that knows more gets it, though it has more to do."""
    for longer in (0, 1):
        router = make(mine)
        router.started(ask(tokens(0, 12)), longer)
        router.started(ask(tokens(0, 8) + tokens(500, 4)), 1 - longer)
        counts = [0, 0]
        counts[longer] = 3
        got = router.route(ask(tokens(0, 16)), loads(*counts))
        assert got == longer, (
            f"replica {longer} got a prompt of 12 tokens, replica {1 - longer} one that shares its first 8; the next "
            "prompt "
            f"begins with all 12 and went to replica {got}, expected {longer}: 3 blocks are there, and only 2 in the "
            "other"
        )


@check("unit", spec="R10.1", hint=1)
def an_unknown_prompt_goes_to_the_least_loaded(mine: Mine) -> None:
    """No replica knows the prompt: the least loaded one gets it, and of equal ones the one that waited longest."""
    router = make(mine, 3)
    got = router.route(ask(tokens(0, 12)), loads(2, 1, 3))
    assert got == 1, f"three replicas have 2, 1 and 3 requests and know nothing; the request went to {got}, expected 1"
    router.started(ask(tokens(100, 12)), 0)
    router.started(ask(tokens(200, 12)), 1)
    got = router.route(ask(tokens(0, 12)), loads(1, 1, 1))
    assert got == 2, (
        f"all have 1 request, and 0 and 1 have just got theirs; the request went to {got}, expected 2. cost() knows "
        "whose "
        "last request is longest ago only if LeastLoadedRouter.started is called"
    )


@check("unit", spec="R10.1", hint=2)
def a_prefix_begins_at_the_beginning(mine: Mine) -> None:
    """A block in the middle is worth nothing without those before it, and a part of a block is none."""
    router = make(mine)
    router.started(ask(tokens(0, 12)), 0)
    got = router.route(ask(tokens(900, 4) + tokens(4, 8)), loads(1, 0))
    assert got == 1, (
        f"the prompts differ in their first block and are equal from then on; the request went to {got}, expected 1: K "
        "and "
        "V depend on everything before them"
    )
    got = router.route(ask(tokens(0, 3)), loads(1, 0))
    assert got == 1, f"3 equal tokens fill no block of {BLOCK}; the request went to {got}, expected the least loaded, 1"


@check("unit", spec="R10.1", hint=3)
def answers_are_cached_as_well(mine: Mine) -> None:
    """The next turn of a conversation contains the answer; its last token has never been computed."""
    router = make(mine)
    first = ask(tokens(0, 8))
    router.started(first, 1)
    router.finished(first, 1, tokens(50, 5))
    router.started(ask(tokens(0, 8)), 0)  # someone else has the same prompt, and no answer
    turn = tokens(0, 8) + tokens(50, 5) + tokens(80, 4)
    got = router.route(ask(turn), loads(0, 2))
    assert got == 1, (
        f"a conversation of 8 tokens and an answer of 5 was in replica 1; its next turn went to {got}, expected 1, "
        "where "
        "a block of the answer is cached, too"
    )
    router = make(mine)
    router.started(first, 1)
    router.finished(first, 1, tokens(50, 4))
    router.started(ask(tokens(0, 8)), 0)
    got = router.route(ask(tokens(0, 8) + tokens(50, 4) + tokens(80, 4)), loads(0, 2))
    assert got == 0, (
        "an answer of 4 tokens: its last token was sampled and never computed, so its block is not full in the cache, "
        "both "
        f"replicas know 2 blocks, and the least loaded one is 0; the request went to {got}"
    )


@check("unit", spec="R10.1", hint=3)
def another_salt_is_another_prefix(mine: Mine) -> None:
    """Requests with different cache_salt share no blocks, so they need not meet."""
    router = make(mine)
    router.started(ask(tokens(0, 12), cache_salt="one"), 0)
    got = router.route(ask(tokens(0, 12), cache_salt="two"), loads(1, 0))
    assert got == 1, f"equal prompts with two salts: the request went to {got}, expected 1, the least loaded"
    got = router.route(ask(tokens(0, 12), cache_salt="one"), loads(1, 0))
    assert got == 0, f"the same prompt with the same salt went to {got}, expected 0, which knows it"


# ---- the load


@check("unit", spec="R10.2", hint=1)
def a_long_queue_is_not_worth_it(mine: Mine) -> None:
    """Up to 4 requests more are accepted for a known prefix, and not 5."""
    router = make(mine, 3)
    router.started(ask(tokens(0, 12)), 0)
    for lead, expected in ((4, 0), (5, 2)):
        got = router.route(ask(tokens(0, 16)), loads(1 + lead, 2, 1))
        assert got == expected, (
            f"replica 0 knows the prompt and has {1 + lead} requests, the others have 2 and 1: the request went to "
            f"{got}, "
            f"expected {expected}. max_lead is 4, and it counts from the least loaded replica"
        )


@check("unit", spec="R10.2", hint=2)
def a_popular_prompt_spreads(mine: Mine) -> None:
    """Ten requests with one prompt do not all wait in one replica."""
    got = same_prompt_ten_times(make(mine, 3))
    expected = same_prompt_ten_times(PrefixRouter(3, BLOCK, 64))
    assert got == expected, (
        f"ten unfinished requests with one prompt: the replicas have {got}, expected {expected}. A replica that got "
        "the "
        "prompt because another one was too far ahead knows it from then on"
    )


@check("unit", spec="R10.2", hint=2)
def of_equal_knowledge_the_least_loaded(mine: Mine) -> None:
    """Two replicas know the same prefix: the less loaded one gets the request."""
    router = make(mine, 3)
    for replica in (0, 2):
        router.started(ask(tokens(0, 12)), replica)
    got = router.route(ask(tokens(0, 12)), loads(3, 0, 1))
    assert got == 2, f"0 and 2 know the prompt and have 3 and 1 requests: it went to {got}, expected 2"


# ---- what the caller relies on


@check("unit", spec="R10.2", hint=3)
def a_dead_replica_gets_nothing(mine: Mine) -> None:
    """Only replicas in `loads` live. One that comes back has an empty cache."""
    router = make(mine, 3)
    router.started(ask(tokens(0, 12)), 0)
    living = [ReplicaLoad(1, 3), ReplicaLoad(2, 2)]
    got = router.route(ask(tokens(0, 12)), living)
    assert got == 2, (
        f"replica 0 knows the prompt and is dead; 1 and 2 have 3 and 2 requests: it went to {got}, expected 2"
    )
    router.forget(0)
    got = router.route(ask(tokens(0, 12)), loads(2, 1, 1))
    assert got in (1, 2), (
        f"replica 0 has died, was started again and knows nothing; the request went to {got}, expected 1 or 2"
    )


@check("unit", spec="R10.2", hint=3)
def asking_changes_nothing(mine: Mine) -> None:
    """The caller may ask without sending the request."""
    router = make(mine)
    for start in range(0, 400, 20):
        router.route(ask(tokens(start, 12)), loads(0, 1))
    router.started(ask(tokens(0, 12)), 1)
    got = router.route(ask(tokens(0, 12)), loads(0, 1))
    assert got == 1, (
        "20 prompts were asked for and not sent, then one of them was sent to replica 1; its next request went to "
        f"{got}, "
        "expected 1: only `started` says that a prompt is in a cache"
    )


@check("property", spec="R10.2", hint=2)
def any_order_of_events_gives_the_choices_of_the_reference(mine: Mine) -> None:
    """Prompts with shared beginnings come, end and die in random order."""
    for seed in range(40):
        rng = random.Random(seed)
        ours, theirs = make(mine, 4, num_blocks=12), PrefixRouter(4, BLOCK, 12)
        counts, running = [0] * 4, list[tuple[Request, int]]()
        for i in range(60):
            if running and rng.random() < 0.45:
                request, replica = running.pop(rng.randrange(len(running)))
                answer = tokens(rng.randrange(5) * 100, rng.randint(1, 9))
                counts[replica] -= 1
                ours.finished(request, replica, answer)
                theirs.finished(request, replica, answer)
                continue
            if rng.random() < 0.05:
                replica = rng.randrange(4)
                ours.forget(replica)
                theirs.forget(replica)
            request = ask(tokens(rng.randrange(3) * 100, rng.randint(1, 20)), f"r{i}")
            living = loads(*counts)
            del living[rng.randrange(1, 4) : rng.choice((0, 4))]
            got, expected = ours.route(request, living), theirs.route(request, living)
            assert got == expected, (
                f"seed {seed}, event {i}: a prompt of {request.num_prompt_tokens} tokens from "
                f"{request.prompt_token_ids[0]} "
                f"on, loads {[(load.replica, load.num_requests) for load in living]}: it went to {got}, expected "
                f"{expected}"
            )
            ours.started(request, got)
            theirs.started(request, got)
            counts[got] += 1
            running.append((request, got))


@check("engine", spec="R10.2", hint=2)
def conversations_find_their_caches(mine: Mine) -> None:
    """Four simulated engines serve conversations: most tokens are found in a cache, and no engine has twice the "
    "work."""
    recipe = Recipe("short tasks", 20.0, (10, 40), (5, 10), turns=4, system_prompt=64, services=6)
    workload, args = follow_recipe(recipe, "tasks", 48), {"model": "tiny", "data_parallel_size": 4, "max_num_seqs": 16}
    mine_run = simulate(workload, parts=dict(mine.parts), **args)
    random_run = simulate(workload, router="random", **args)
    ours, theirs = mine_run["prefix_hit_share"], random_run["prefix_hit_share"]
    assert ours > theirs + 0.1, (
        f"four engines, 12 conversations of 4 turns: {ours:.0%} of the tokens were found in a cache, and {theirs:.0%} "
        "with "
        f"{RandomRouter.__name__}; expected far more"
    )
    assert mine_run["busiest_share"] < 2, f"the busiest engine computed {mine_run['busiest_share']:.1f} times the mean"
