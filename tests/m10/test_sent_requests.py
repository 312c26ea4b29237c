"""SentRequests: what becomes of the requests of a replica that dies. Units, and random histories against a model."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from folovllm.engine.sent_requests import SentRequest, SentRequests
from folovllm.outputs import EngineCoreOutput
from folovllm.request import RequestStatus, RequestTimes
from tests.core_helpers import make_request

pytestmark = pytest.mark.m10


def send(requests: SentRequests, request_id: str, replica: int, prompt: int = 5) -> SentRequest:
    sent = requests.add(make_request(request_id, prompt))
    assert replica in requests.places(sent, [0, 1])
    requests.assign(sent, replica)
    return sent


def tokens(request_id: str, *token_ids: int, finish: str | None = None) -> EngineCoreOutput:
    return EngineCoreOutput(request_id, list(token_ids), finish_reason=finish, times=RequestTimes(1, 2, 3, 4, 5))


def try_suspect(requests: SentRequests, suspect: SentRequest, replica: int) -> None:
    """The replica has it."""
    requests.assign(suspect, replica)
    assert suspect.is_suspect
    suspect.has_arrived = True


def ends(outputs: list[EngineCoreOutput]) -> list[tuple[str, str | None]]:
    return [(output.request_id, output.finish_reason) for output in outputs]


def test_a_request_continues_with_the_tokens_that_its_reader_has() -> None:
    requests = SentRequests(2)
    sent = send(requests, "a", 0)
    first = sent.continuation()
    first.set_status(RequestStatus.RUNNING)  # what an engine in a thread does to the request that it gets
    first.append_output_token_id(7)
    requests.receive([tokens("a", 7), tokens("a", 8)])
    assert requests.lose(0) == []
    assert requests.waiting() == [sent]
    again = sent.continuation()
    assert again.output_token_ids == [7, 8] and again.all_token_ids == [*sent.request.prompt_token_ids, 7, 8]
    assert again.status is RequestStatus.WAITING and again.num_computed_tokens == 0
    assert again.num_cached_tokens == 0 and again.times.scheduled == 3, "queue and prefill were over before the death"
    assert sent.request.output_token_ids == [] and again.sampling_params is sent.request.sampling_params


def test_what_ends_is_told_once() -> None:
    requests = SentRequests(2)
    send(requests, "a", 0)
    ((sent, last),) = requests.receive([tokens("a", 7, finish="stop")])
    assert sent.output_token_ids == [7] and last.finish_reason == "stop" and len(requests) == 0
    assert requests.receive([tokens("a", 9, finish="stop")]) == [] and requests.abort(["a"]) == []
    assert requests.lose(0) == [] and requests.load(0).num_requests == 0


def test_an_aborted_request_is_confirmed_by_its_replica_or_by_its_death() -> None:
    requests = SentRequests(2)
    for request_id in "abc":
        send(requests, request_id, 0)
    assert [sent.request.request_id for sent in requests.abort(["a", "b", "unknown"])] == ["a", "b"]
    assert requests.receive([tokens("a", 1), tokens("a", finish="abort")]) == []
    assert ends(requests.lose(0)) == [("b", "abort")]
    assert [sent.request.request_id for sent in requests.waiting()] == ["c"]


def test_a_request_that_waits_is_aborted_at_once() -> None:
    requests = SentRequests(2)
    requests.add(make_request("a", 5))
    (sent,) = requests.abort(["a"])
    assert sent.replica is None and requests.num_waiting == 0
    assert requests.places(requests.add(make_request("a", 5)), [0, 1]) == [0, 1]


def test_a_new_request_stays_behind_the_aborted_one_of_its_name() -> None:
    """In another replica its first tokens could come before the old one is confirmed, and would be dropped as late."""
    requests = SentRequests(2)
    send(requests, "a", 1)
    requests.abort(["a"])
    new = requests.add(make_request("a", 3))
    assert requests.places(new, [0, 1]) == [1]
    requests.assign(new, 1)
    assert requests.receive([tokens("a", 1, finish="stop")]) == [], "this is the old one, which ended meanwhile"
    ((sent, _),) = requests.receive([tokens("a", 2, finish="length")])
    assert sent is new and new.output_token_ids == [2]


def test_both_requests_of_one_name_survive_the_death_of_their_replica() -> None:
    requests = SentRequests(2)
    send(requests, "a", 1)
    requests.abort(["a"])
    new = requests.add(make_request("a", 3))
    requests.assign(new, 1)
    assert ends(requests.lose(1)) == [("a", "abort")]
    assert requests.waiting() == [new] and requests.places(new, [0]) == [0]


def test_after_a_death_a_replica_tries_one_suspect_at_a_time() -> None:
    requests = SentRequests(2)
    a, b = send(requests, "a", 0), send(requests, "b", 0)
    requests.lose(0)
    assert a.is_suspect and b.is_suspect and requests.is_searching
    requests.assign(a, 1)
    assert requests.places(b, [1]) == [] and requests.places(b, [0, 1]) == [0]
    fresh = requests.add(make_request("new", 3))
    assert fresh.is_suspect and requests.places(fresh, [1]) == [], "or a death would have two to blame"
    requests.receive([tokens("a", 5)])
    assert not a.is_suspect and requests.places(b, [1]) == [1], "a token acquits it"
    requests.assign(b, 1)
    requests.receive([tokens("b", 5)])
    requests.assign(fresh, 1)
    requests.receive([tokens("new", 5)])
    assert not requests.is_searching and not requests.add(make_request("last", 3)).is_suspect


def test_a_trial_has_one_request_without_a_token() -> None:
    """With two, a death would have two to blame, and several requests that kill would take engine after engine."""
    requests = SentRequests(3)
    old, bad = send(requests, "old", 0), send(requests, "bad", 0)
    send(requests, "busy", 1)
    requests.receive([tokens("old", 1)])
    assert requests.keeps_trials_clear(old, 0) and not requests.is_searching, "no one is suspected"
    requests.lose(0)
    assert not requests.keeps_trials_clear(bad, 1) and requests.keeps_trials_clear(bad, 2)
    requests.receive([tokens("busy", 1)])
    assert requests.keeps_trials_clear(bad, 1)
    try_suspect(requests, bad, 1)
    assert not requests.keeps_trials_clear(old, 1) and requests.keeps_trials_clear(old, 2)
    requests.receive([tokens("bad", 1)])
    assert requests.keeps_trials_clear(old, 1)


def test_a_request_that_is_alone_to_blame_for_a_second_death_fails() -> None:
    requests = SentRequests(2)
    bad, good = send(requests, "bad", 0), send(requests, "good", 0)
    other = send(requests, "other", 1)
    requests.receive([tokens("other", 1)])
    requests.lose(0)
    try_suspect(requests, bad, 1)
    assert ends(requests.lose(1)) == [("bad", "error")]
    assert requests.waiting() == [other, good]
    assert not other.is_suspect and good.is_suspect


def test_a_death_is_blamed_on_those_without_a_token_from_that_replica() -> None:
    requests = SentRequests(2)
    old, new = send(requests, "old", 0), send(requests, "new", 0)
    requests.receive([tokens("old", 1)])
    requests.lose(0)
    assert not old.is_suspect and new.is_suspect
    requests.assign(old, 1)
    try_suspect(requests, new, 1)
    assert ends(requests.lose(1)) == [], "neither had a token from this replica"
    assert old.is_suspect and new.is_suspect and (old.num_blamed, new.num_blamed) == (1, 2)


def test_a_suspect_that_had_not_arrived_is_not_blamed() -> None:
    """Both replicas were killed at once. The front end has heard of one death when it sends to the other replica."""
    requests = SentRequests(2)
    sent, other = send(requests, "a", 0), send(requests, "other", 1)
    requests.receive([tokens("other", 1)])
    requests.lose(0)
    requests.assign(sent, 1)
    assert requests.lose(1) == [] and sent.is_suspect and sent.num_blamed == 1
    assert other.is_suspect and other.num_blamed == 1
    requests.assign(sent, 1)
    requests.lose(1)
    try_suspect(requests, sent, 0)
    assert ends(requests.lose(0)) == [("a", "error")]


def test_a_death_that_nothing_explains_is_blamed_on_all() -> None:
    requests = SentRequests(2)
    a, b = send(requests, "a", 0), send(requests, "b", 0)
    requests.receive([tokens("a", 1), tokens("b", 1)])
    assert requests.lose(0) == [] and a.is_suspect and b.is_suspect


def test_a_new_request_fails_only_after_its_own_second_death() -> None:
    """It joins during a search, so it is tried alone. Its first death may be chance."""
    requests = SentRequests(2)
    old = send(requests, "old", 0)
    requests.lose(0)
    new = requests.add(make_request("new", 3))
    requests.assign(old, 0)
    try_suspect(requests, new, 1)
    assert requests.lose(1) == [] and new.is_suspect
    try_suspect(requests, new, 1)
    assert ends(requests.lose(1)) == [("new", "error")] and len(requests) == 1


def test_no_request_is_to_blame_for_a_sixth_death() -> None:
    """One that kills its engine after some tokens, among others that are with it."""
    requests = SentRequests(2)
    bad = requests.add(make_request("bad", 3))
    for number in range(4):
        requests.assign(bad, 0)
        bad.has_arrived = True
        requests.receive([tokens("bad", number)])
        send(requests, f"innocent {number}", 0)
        requests.receive([tokens(f"innocent {number}", 1)])
        assert requests.lose(0) == []
        requests.abort([f"innocent {number}"])
    try_suspect(requests, bad, 0)
    send(requests, "innocent", 1)
    assert ends(requests.lose(0)) == [("bad", "error")]


def test_a_suspect_that_is_aborted_makes_room_for_the_next() -> None:
    requests = SentRequests(2)
    a, b = send(requests, "a", 0), send(requests, "b", 0)
    requests.lose(0)
    requests.assign(a, 1)
    requests.abort(["a"])
    assert requests.places(b, [1]) == [1]
    assert ends(requests.lose(1)) == [("a", "abort")]


def test_the_load_counts_requests_and_prompts_without_a_token() -> None:
    requests = SentRequests(2)
    send(requests, "a", 0, prompt=5)
    send(requests, "b", 0, prompt=7)
    assert (requests.load(0).num_requests, requests.load(0).num_prompt_tokens) == (2, 12)
    requests.receive([tokens("a", 1)])
    assert (requests.load(0).num_requests, requests.load(0).num_prompt_tokens) == (2, 7)
    requests.receive([tokens("a", 1, finish="stop")])
    requests.abort(["b"])
    assert (requests.load(0).num_requests, requests.load(0).num_prompt_tokens) == (0, 0)
    assert requests.load(1).num_requests == 0


class History(RuleBasedStateMachine):
    """Random histories. The model: what each reader has got, which must be 0, 1, 2, ... without a gap, and one end.

    A replica is a dict of requests, each with the number of the next token. A death drops the dict, and what has not
    been received with it.
    """

    NUM_REPLICAS = 3

    def __init__(self) -> None:
        super().__init__()
        self.requests = SentRequests(self.NUM_REPLICAS)
        self.replicas: list[dict[str, list[int]]] = [{} for _ in range(self.NUM_REPLICAS)]  # name -> its generations
        self.old: list[list[str]] = [[] for _ in range(self.NUM_REPLICAS)]  # aborted there, not confirmed
        self.got: dict[str, int] = {}  # unfinished: how many tokens the reader has
        self.num_blamed: dict[str, int] = {}
        self.arrived: set[str] = set()
        self.first: dict[str, list[int]] = {}  # the first token that a request gets where it is now
        self.count = 0

    @rule()
    def add(self) -> None:
        name = f"r{self.count}"
        self.count += 1
        self.requests.add(make_request(name, 3))
        self.got[name], self.num_blamed[name] = 0, 0
        self.send()

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """A replica gives each of its requests a token, and one of them may end with it."""
        index = data.draw(st.integers(0, self.NUM_REPLICAS - 1))
        replica = self.replicas[index]
        last = data.draw(st.sampled_from([None, *replica]))
        outputs = [tokens(name, *given, finish="stop" if name == last else None) for name, given in replica.items()]
        confirmed = [tokens(name, finish="abort") for name in self.old[index]]
        self.old[index] = []
        self.arrive(index)
        ended = self.requests.receive([*confirmed, *outputs])
        assert [sent.request.request_id for sent, _ in ended] == ([last] if last else [])
        for name in list(replica):
            assert replica[name] == [self.got[name]], "a gap, or a token twice"
            self.got[name] += 1
            replica[name] = [self.got[name]]
        if last:
            del replica[last], self.got[last]
        self.send()

    @rule(index=st.integers(0, NUM_REPLICAS - 1))
    def arrive(self, index: int) -> None:
        """A replica says that it has what it was sent."""
        for name in self.replicas[index]:
            self.requests._requests[name].has_arrived = True
            self.arrived.add(name)

    @precondition(lambda self: self.got)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.got)))
        (sent,) = self.requests.abort([name])
        del self.got[name]
        if sent.replica is not None:
            del self.replicas[sent.replica][name]
            self.old[sent.replica].append(name)

    @rule(index=st.integers(0, NUM_REPLICAS - 1))
    def die(self, index: int) -> None:
        replica = self.replicas[index]
        assert sum(self.requests._requests[name].is_suspect for name in replica) <= 1
        there = [n for n in replica if n in self.arrived or not self.requests._requests[n].is_suspect]
        blamed = [name for name in there if replica[name] == self.first[name]] or there
        for name in blamed:
            self.num_blamed[name] += 1
        failed = [n for n in blamed if self.num_blamed[n] >= (2 if blamed == [n] else 5)]
        ended = ends(self.requests.lose(index))
        assert sorted(ended) == sorted([(n, "abort") for n in self.old[index]] + [(n, "error") for n in failed])
        for name in failed:
            del self.got[name]
        self.replicas[index], self.old[index] = {}, []
        self.send(without=index)

    def send(self, without: int | None = None) -> None:
        living = [i for i in range(self.NUM_REPLICAS) if i != without]
        for sent in self.requests.waiting():
            places = self.requests.places(sent, living)
            if places:
                index = random.Random(self.count).choice(places)
                self.requests.assign(sent, index)
                request = sent.continuation()
                assert request.output_token_ids == list(range(self.got[request.request_id]))
                self.arrived.discard(request.request_id)
                self.first[request.request_id] = [len(request.output_token_ids)]
                self.replicas[index][request.request_id] = [len(request.output_token_ids)]

    @invariant()
    def counts_agree(self) -> None:
        assert set(self.requests._requests) == set(self.got)
        for index, replica in enumerate(self.replicas):
            assert self.requests.load(index).num_requests == len(replica)
            without_token = sum(3 for name in replica if not self.requests._requests[name].output_token_ids)
            assert self.requests.load(index).num_prompt_tokens == without_token
        assert self.requests.num_waiting == len(self.got) - sum(map(len, self.replicas))


TestHistory = pytest.mark.m10(History.TestCase)
TestHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
