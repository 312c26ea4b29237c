"""The checks of m10/resend: outputs, aborts and deaths by hand, and then in any order."""

import random
from typing import Any

from folovllm.engine.sent_requests import SentRequests
from folovllm.learn.check import Mine, check
from folovllm.outputs import EngineCoreOutput
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams


def send(requests: Any, replica: int, *names: str) -> list[Any]:
    """Adds requests with prompts of 4 tokens and sends them to a replica."""
    entries = []
    for name in names:
        entries.append(requests.add(Request(name, [1, 2, 3, 4], SamplingParams(max_tokens=8), arrival_time=0.0)))
        requests.assign(entries[-1], replica)
    return entries


def give(requests: Any, name: str, token_ids: list[int], finish_reason: str | None = None) -> list[tuple[str, str]]:
    """One output of a replica. Returns the ends that `receive` reports: (id, finish_reason)."""
    ended = requests.receive([EngineCoreOutput(name, token_ids, finish_reason=finish_reason)])
    return [(entry.request.request_id, output.finish_reason) for entry, output in ended]


def lose(requests: Any, replica: int) -> list[tuple[str, str | None]]:
    """The ends that a death causes: (id, finish_reason)."""
    return [(output.request_id, output.finish_reason) for output in requests.lose(replica)]


def waiting(requests: Any) -> list[str]:
    return [entry.request.request_id for entry in requests.waiting()]


def load(requests: Any, replica: int) -> tuple[int, int]:
    one = requests.load(replica)
    return one.num_requests, one.num_prompt_tokens


def send_what_may_go(requests: Any, living: list[int], has_arrived: bool = True) -> list[str]:
    """Sends all that waits to the first replica that may have it, as the client does. Returns the ids that went."""
    sent = []
    for entry in requests.waiting():
        if places := requests.places(entry, living):
            requests.assign(entry, places[0])
            entry.has_arrived = has_arrived
            sent.append(entry.request.request_id)
    return sent


def prediction() -> str:
    requests = SentRequests(2)
    send(requests, 0, "a", "b", "c")
    send(requests, 1, "d", "e", "f")
    for name in "def":
        give(requests, name, [7])
    requests.lose(0)
    went = send_what_may_go(requests, [1])
    failed = requests.lose(1)
    return (
        f"{len(went)}, {len(failed)}, {len(requests.waiting())}\na replica computes one suspect at a time; when it "
        "dies, "
        "the suspect is to blame, and d, e and f are not"
    )


# ---- outputs


@check("unit", spec="R10.10", hint=2)
def tokens_are_kept_until_the_end(mine: Mine) -> None:
    """The front end knows what the reader has, and hears of the end once."""
    requests = mine.cls(2)
    (entry,) = send(requests, 0, "a")
    seen = [
        give(requests, "a", [7]),
        give(requests, "a", [8]),
        give(requests, "a", [9], "stop"),
        give(requests, "a", [9], "stop"),
    ]
    assert entry.output_token_ids == [7, 8, 9], f"the outputs had 7, 8 and 9; kept are {entry.output_token_ids}"
    assert seen == [[], [], [("a", "stop")], []], (
        f"three outputs and a late one ended {seen}, expected [[], [], [('a', 'stop')], []]: an end counts once, and "
        "what "
        "comes for an unknown id is late"
    )
    left = (len(requests), load(requests, 0))
    assert left == (0, (0, 0)), f"after its end, (requests, load of its replica) is {left}, expected (0, (0, 0))"


@check("unit", spec="R10.10", hint=2)
def one_step_has_outputs_of_many(mine: Mine) -> None:
    """All outputs of a step are taken in, whatever comes before them."""
    requests = mine.cls(1)
    entries = send(requests, 0, "a", "b", "c")
    requests.abort(["a"])
    outputs = [EngineCoreOutput("a", [1]), EngineCoreOutput("x", [2]), EngineCoreOutput("b", [3], finish_reason="stop"),
               EngineCoreOutput("c", [4])]  # fmt: skip
    ended = [entry.request.request_id for entry, _ in requests.receive(outputs)]
    got = (ended, entries[2].output_token_ids)
    assert got == (["b"], [4]), (
        "a step had outputs of an aborted request, of an unknown one, of b (its last) and of c: (ended, tokens of c) "
        "is "
        f"{got}, expected (['b'], [4])"
    )


@check("unit", spec="R10.10", hint=2)
def an_aborted_request_gets_no_more_tokens(mine: Mine) -> None:
    """Its outputs are on their way for a while, and a new request may have its id already."""
    requests = mine.cls(2)
    send(requests, 0, "a")
    requests.abort(["a"])
    (new,) = send(requests, 0, "a")
    seen = [give(requests, "a", [5]), give(requests, "a", [], "abort")]
    assert seen == [[], []] and new.output_token_ids == [], (
        f"a was aborted and its id used again; a token of the old one and its confirmation came: ends {seen}, tokens "
        "of the "
        f"new one {new.output_token_ids}, expected none of either"
    )
    seen = [give(requests, "a", [6]), give(requests, "a", [7], "stop")]
    assert seen == [[], [("a", "stop")]] and new.output_token_ids == [6, 7], (
        f"after the confirmation the outputs belong to the new request: ends {seen}, tokens {new.output_token_ids}"
    )


# ---- a death


@check("unit", spec="R10.11", hint=1)
def nothing_is_lost_and_nothing_comes_twice(mine: Mine) -> None:
    """Each request of the dead replica waits, with the tokens that its reader has."""
    requests = mine.cls(2)
    a, b = send(requests, 0, "a", "b")
    (c,) = send(requests, 1, "c")
    give(requests, "a", [7])
    give(requests, "a", [8])
    ended = lose(requests, 0)
    got = (ended, waiting(requests), c.replica)
    assert got == ([], ["a", "b"], 1), (
        f"replica 0 died with a and b, c is in replica 1: (ended, waiting, replica of c) is {got}, expected "
        "([], ['a', 'b'], 1)"
    )
    tokens = (a.continuation().output_token_ids, b.continuation().output_token_ids)
    assert tokens == ([7, 8], []), (
        f"what is sent again has the output tokens {tokens}, expected ([7, 8], []): with fewer the reader gets tokens "
        "twice"
    )
    assert a.replica is None and b.replica is None, (
        f"a and b are in replicas {a.replica} and {b.replica}, expected None"
    )


@check("unit", spec="R10.11", hint=3)
def the_load_of_the_dead_is_gone(mine: Mine) -> None:
    """The replica that takes its place starts with nothing."""
    requests = mine.cls(2)
    send(requests, 0, "a", "b")
    give(requests, "a", [7])
    lose(requests, 0)
    got = load(requests, 0)
    assert got == (0, 0), f"replica 0 died with two requests; its (requests, prompt tokens) are {got}, expected (0, 0)"
    send_what_may_go(requests, [1])
    got = load(requests, 1)
    assert got == (2, 4), (
        "a, which has a token, and b, which has none and a prompt of 4 tokens, were sent to replica 1; its load is "
        f"{got}, "
        "expected (2, 4)"
    )


@check("unit", spec="R10.11", hint=2)
def the_lost_go_before_those_that_wait(mine: Mine) -> None:
    """They came first, and their readers are in the middle of an answer."""
    requests = mine.cls(2)
    send(requests, 0, "a", "b")
    requests.add(Request("new", [1], SamplingParams(max_tokens=2), arrival_time=0.0))
    lose(requests, 0)
    got = waiting(requests)
    assert got == ["a", "b", "new"], f"a and b ran when `new` came, then their replica died: the order is {got}"


@check("unit", spec="R10.11", hint=3)
def aborted_requests_end_with_their_replica(mine: Mine) -> None:
    """A dead replica confirms nothing: each abort ends once, and nothing is sent again for it."""
    requests = mine.cls(2)
    send(requests, 0, "a", "b")
    requests.abort(["a"])
    send(requests, 0, "a")
    requests.abort(["a"])
    got, left = lose(requests, 0), waiting(requests)
    assert (got, left) == ([("a", "abort"), ("a", "abort")], ["b"]), (
        f"two requests with the id a were aborted and not confirmed when their replica died: ends {got}, waiting "
        f"{left}; "
        "expected an `abort` for each of them, and only b waits"
    )
    send(requests, 1, "a")
    seen = give(requests, "a", [5], "stop")
    assert seen == [("a", "stop")], (
        f"a new request with that id ended as {seen}: the abort of the old one is not forgotten"
    )


# ---- a request that kills


@check("unit", spec="R10.12", hint=1)
def one_suspect_at_a_time(mine: Mine) -> None:
    """Until each has got a token, the requests of a dead replica are suspects, and a replica computes one."""
    requests = mine.cls(2)
    send(requests, 0, "a", "b", "c")
    lose(requests, 0)
    went = send_what_may_go(requests, [1])
    assert went == ["a"], f"a, b and c were in a dying replica; {went} went to replica 1 at once, expected only a"
    give(requests, "a", [])
    went = send_what_may_go(requests, [1])
    assert went == [], f"a has got an output without a token, which proves nothing; {went} followed, expected none"
    give(requests, "a", [7])
    went = send_what_may_go(requests, [1])
    assert went == ["b"], f"a has got a token and is no suspect any more; {went} followed, expected b"


@check("unit", spec="R10.12", hint=1)
def one_death_proves_nothing(mine: Mine) -> None:
    """A request that is alone in its replica may have been unlucky: it is sent again."""
    requests = mine.cls(2)
    send(requests, 0, "a")
    got, left = lose(requests, 0), waiting(requests)
    assert (got, left) == ([], ["a"]), f"a was alone in the first dying replica: ends {got}, waiting {left}, expected a"


@check("unit", spec="R10.12", hint=2)
def who_has_got_a_token_is_not_blamed(mine: Mine) -> None:
    """A death is blamed on the requests that had no token from that replica; on all of them if each had one."""
    requests = mine.cls(2)
    a, b, c = send(requests, 0, "a", "b", "c")
    give(requests, "a", [7])
    lose(requests, 0)
    got = [entry.is_suspect for entry in (a, b, c)]
    assert got == [False, True, True], (
        f"a had got a token from the dead replica, b and c had not: is_suspect is {got}, expected [False, True, True]"
    )
    requests = mine.cls(2)
    a, b = send(requests, 0, "a", "b")
    give(requests, "a", [7])
    give(requests, "b", [8])
    lose(requests, 0)
    got = [entry.is_suspect for entry in (a, b)]
    assert got == [True, True], f"both had got a token when their replica died: is_suspect is {got}, expected both"


@check("unit", spec="R10.12", hint=3)
def tokens_of_another_replica_do_not_count(mine: Mine) -> None:
    """A request that was sent again has proved nothing in its new replica."""
    requests = mine.cls(2)
    a, _ = send(requests, 0, "a", "b")
    (c,) = send(requests, 1, "c")
    give(requests, "a", [7])
    give(requests, "c", [8])
    lose(requests, 0)
    requests.assign(a, 1)
    lose(requests, 1)
    got = (a.is_suspect, c.is_suspect)
    assert got == (True, False), (
        "a had a token from replica 0 and came to replica 1, which died before a got one there; c had got one there: "
        f"(a, c) are suspects: {got}, expected (True, False)"
    )


@check("unit", spec="R10.12", hint=3)
def a_suspect_on_its_way_is_not_blamed(mine: Mine) -> None:
    """A replica that died before a suspect arrived did not die of it. The suspect stays one."""
    requests = mine.cls(2)
    (a,) = send(requests, 0, "a")
    (c,) = send(requests, 1, "c")
    give(requests, "c", [8])
    lose(requests, 0)
    send_what_may_go(requests, [1], has_arrived=False)
    got = (lose(requests, 1), a.is_suspect, c.is_suspect)
    assert got == ([], True, True), (
        "a, a suspect, was sent to replica 1, which died before a had arrived there; c had a token from it: (ended, a "
        "is a "
        f"suspect, c is one) is {got}, expected ([], True, True): c alone was there, and a is as suspect as before"
    )
    send_what_may_go(requests, [0], has_arrived=False)
    got = (a.has_arrived, a.has_token)
    assert got == (False, False), f"a is on its way to the next replica: (has_arrived, has_token) is {got}"


@check("unit", spec="R10.12", hint=2)
def the_suspect_fails_alone(mine: Mine) -> None:
    """A second replica dies: the suspect in it is to blame, and no other request is suspected."""
    requests = mine.cls(2)
    send(requests, 0, "poison", "a")
    send(requests, 1, "b", "c")
    give(requests, "b", [7])
    give(requests, "c", [8])
    lose(requests, 0)
    send_what_may_go(requests, [1])
    got, left = lose(requests, 1), waiting(requests)
    assert (got, left) == ([("poison", "error")], ["b", "c", "a"]), (
        f"poison was in both dying replicas: ends {got}, waiting {left}, expected [('poison', 'error')] and b, c, a"
    )
    went = send_what_may_go(requests, [0])
    assert sorted(went) == ["a", "b", "c"], (
        f"b and c were only beside the culprit, and a was never sent on: {went} went to the new replica, expected all "
        "three "
        "at once (a is the only suspect)"
    )


@check("unit", spec="R10.12", hint=2)
def two_who_may_be_to_blame_do_not_fail(mine: Mine) -> None:
    """If two requests may be the reason, neither fails yet; a request that was to blame five times does."""
    requests = mine.cls(1)
    send(requests, 0, "a", "b")
    ends = [lose(requests, 0)]
    for death in range(2, 6):
        for entry in requests.waiting():
            requests.assign(entry, 0)
            entry.has_arrived = True
        ends.append(lose(requests, 0))
        if death < 5:
            assert ends[-1] == [], (
                f"death {death} with a and b, neither with a token: ended {ends[-1]}, expected neither"
            )
    expected = [("a", "error"), ("b", "error")]
    assert ends[-1] == expected and not waiting(requests), (
        f"five deaths, each with a and b: the fifth ended {ends[-1]}, expected {expected}: it must end at some time"
    )


@check("property", spec="R10.11", hint=2)
def every_request_ends_once_with_its_own_tokens(mine: Mine) -> None:
    """Replicas compute, die and come back in any order; the readers get 0, 1, 2, ... and one end each."""
    for seed in range(60):
        _play(mine, random.Random(seed), f"seed {seed}")


def _play(mine: Mine, rng: random.Random, name: str) -> None:
    requests, num_replicas, length = mine.cls(3), 3, 5
    read: dict[str, list[int]] = {f"r{i}": [] for i in range(8)}
    ends: dict[str, list[str]] = {request_id: [] for request_id in read}
    for request_id in read:
        requests.add(Request(request_id, [1, 2], SamplingParams(max_tokens=length), arrival_time=0.0))
    running: list[dict[str, list[int]]] = [{} for _ in range(num_replicas)]
    for step in range(400):
        for entry in requests.waiting():
            if places := requests.places(entry, range(num_replicas)):
                where = rng.choice(places)
                requests.assign(entry, where)
                entry.has_arrived = rng.random() < 0.8
                again = entry.continuation()
                running[where][again.request_id] = list(again.output_token_ids)
        replica = rng.randrange(num_replicas)
        if step < 200 and rng.random() < 0.1:
            running[replica] = {}
            for output in requests.lose(replica):
                ends[output.request_id].append(output.finish_reason or "")
            continue
        outputs = []
        for request_id, tokens in list(running[replica].items()):
            tokens.append(len(tokens))
            read[request_id].append(tokens[-1])
            last = len(tokens) == length
            outputs.append(EngineCoreOutput(request_id, [tokens[-1]], finish_reason="length" if last else None))
            if last:
                del running[replica][request_id]
        for entry, output in requests.receive(outputs):
            ends[entry.request.request_id].append(output.finish_reason)
    for request_id, tokens in read.items():
        assert tokens == list(range(len(tokens))), (
            f"{name}: {request_id} read {tokens}: a token is missing or came twice"
        )
        got = ends[request_id]
        assert got in (["length"], ["error"]), f"{name}: {request_id} ended {got}, expected one end"
        assert got == ["error"] or len(tokens) == length, f"{name}: {request_id} ended after {len(tokens)} tokens"
    assert len(requests) == 0, f"{name}: {len(requests)} requests are kept after their end"
