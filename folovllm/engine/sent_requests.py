"""SentRequests: which replica computes which request, what it has given so far, and what follows if the replica dies.

Milestone: M10. vLLM counterpart: `reqs_in_flight` of `DPLBAsyncMPClient` in vllm/v1/engine/core_client.py, which only
counts; there the death of one engine ends the server, and all requests with it.

Row 1: no torch, no replicas: the client tells this class what it has sent and what has come back.

If a replica dies, each of its requests is sent again, together with the tokens that its reader already has. The new
replica computes their K/V as a part of the prompt, and continues: sampling noise depends on a request's seed and on a
token's position alone, so the reader cannot tell. A request may also be the reason for the death. It must not kill one
replica after another, and others must not fail with it:

    - A death is blamed on the requests that had no token from that replica yet, or on all if each had one. They are
      suspects until each has got a token from another replica.
    - A replica gets a suspect when all its other requests have a token, and nothing else until the suspect has one. New
      requests are suspects meanwhile. So a replica that dies with a suspect dies with one request to blame. A suspect
      that had not arrived there yet is not blamed.
    - A request that is alone to blame for a death, and was to blame for another one before, fails. One that was to
      blame for five deaths fails in any case.
"""

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from folovllm.engine.router import ReplicaLoad
from folovllm.outputs import EngineCoreOutput
from folovllm.request import Request, RequestTimes

MAX_BLAMED = 5


@dataclass(eq=False)
class SentRequest:
    """An unfinished request, and what has come back of it."""

    request: Request
    replica: int | None = None  # None: it waits for one
    output_token_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = -1
    times: RequestTimes | None = None
    has_token: bool = False  # from the replica that it is in
    is_suspect: bool = False
    has_arrived: bool = False  # the replica has said so; only suspects are asked about
    num_blamed: int = 0  # how many deaths it may have been the reason for

    def continuation(self) -> Request:
        """The request to send: with the tokens that its reader has.

        The engine changes the request that it gets, in a thread even this very object, so each replica gets its own.
        """
        request = copy.copy(self.request)
        request.output_token_ids, request.all_token_ids = list(self.output_token_ids), []
        request.rewind(len(self.output_token_ids))
        request.num_cached_tokens = self.num_cached_tokens
        request.times = replace(self.times or request.times)
        return request


class SentRequests:
    """The unfinished requests of all replicas."""

    def __init__(self, num_replicas: int) -> None:
        self._requests: dict[str, SentRequest] = {}  # the user's order
        self._waiting: dict[str, SentRequest] = {}  # those without a replica, in the order in which they are sent
        self._leaving: dict[str, tuple[int, int]] = {}  # aborted: id -> (replica, how many it has not confirmed)
        self._suspects: dict[int, SentRequest] = {}  # replica -> the suspect that it computes
        self._num_requests = [0] * num_replicas
        self._num_without_token = [0] * num_replicas  # requests without a token from that replica
        self._num_prompt_tokens = [0] * num_replicas  # of the requests that have no token yet

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_searching(self) -> bool:
        """Whether a replica has died, and it is not clear yet with which request."""
        return bool(self._suspects) or any(sent.is_suspect for sent in self._waiting.values())

    def load(self, replica: int) -> ReplicaLoad:
        return ReplicaLoad(replica, self._num_requests[replica], self._num_prompt_tokens[replica])

    # ---- on the way down

    def add(self, request: Request) -> SentRequest:
        """A new request, which waits for a replica."""
        assert request.request_id not in self._requests, "the front end refuses an id that is in use"
        sent = SentRequest(request, is_suspect=self.is_searching)
        self._requests[request.request_id] = self._waiting[request.request_id] = sent
        return sent

    def withdraw(self, sent: Iterable[SentRequest]) -> None:
        """These requests could not be sent."""
        for entry in sent:
            self._remove(entry)

    def waiting(self) -> list[SentRequest]:
        return list(self._waiting.values())

    def places(self, sent: SentRequest, living: Collection[int]) -> list[int]:
        """Those of the living replicas that may have the request.

        If an aborted request of the same id is not confirmed yet, the new one must stay behind it in the same replica:
        otherwise tokens of the new one could be taken for late ones of the old one.
        """
        if sent.request.request_id in self._leaving:
            living = [self._leaving[sent.request.request_id][0]]
        return [replica for replica in living if not (sent.is_suspect and replica in self._suspects)]

    def keeps_trials_clear(self, sent: SentRequest, replica: int) -> bool:
        """Whether a death of `replica`, if it gets the request, has one request to blame.

        That is so if a suspect is the only request there without a token. While no one is suspected it does not matter.
        """
        return not self._num_without_token[replica] if sent.is_suspect else replica not in self._suspects

    def assign(self, sent: SentRequest, replica: int) -> None:
        """The request is sent to `replica`."""
        del self._waiting[sent.request.request_id]
        sent.replica = replica
        self._count(sent, 1)
        if sent.is_suspect:
            self._suspects[replica] = sent

    def abort(self, request_ids: Iterable[str]) -> list[SentRequest]:
        """Ends these requests and returns them: those in a replica are to be aborted there. Unknown ids have ended."""
        aborted = [self._requests[request_id] for request_id in request_ids if request_id in self._requests]
        for sent in aborted:
            request_id, replica = sent.request.request_id, sent.replica
            self._remove(sent)
            if replica is not None:
                self._leaving[request_id] = (replica, self._leaving.get(request_id, (replica, 0))[1] + 1)
        return aborted

    # ---- on the way up

    def receive(self, outputs: Iterable[EngineCoreOutput]) -> list[tuple[SentRequest, EngineCoreOutput]]:
        """Takes in what a replica has sent. Returns the requests that have ended, each with its last output."""
        ended = []
        for output in outputs:
            if output.request_id in self._leaving:
                if output.finished:
                    self._confirm(output.request_id)
            elif (sent := self._requests.get(output.request_id)) is not None:
                self._take(sent, output)
                if output.finished:
                    ended.append((sent, output))
                    self._remove(sent)
        return ended

    def _take(self, sent: SentRequest, output: EngineCoreOutput) -> None:
        if not output.new_token_ids:
            return
        assert sent.replica is not None
        if not sent.output_token_ids:
            self._num_prompt_tokens[sent.replica] -= sent.request.num_prompt_tokens
        self._num_without_token[sent.replica] -= not sent.has_token
        sent.output_token_ids += output.new_token_ids
        sent.has_token = True
        sent.num_cached_tokens, sent.times = output.num_cached_tokens, output.times
        self._acquit(sent)

    def _confirm(self, request_id: str) -> None:
        replica, count = self._leaving[request_id]
        if count > 1:
            self._leaving[request_id] = (replica, count - 1)
        else:
            del self._leaving[request_id]

    # ---- the death of a replica

    def lose(self, replica: int) -> list[EngineCoreOutput]:
        """`replica` has died. Returns the last outputs of the requests that end with it.

        These are the aborted ones, which it cannot confirm any more, and those that fail. The others wait.
        """
        aborted = [(i, count) for i, (where, count) in self._leaving.items() if where == replica]
        for request_id, _ in aborted:
            del self._leaving[request_id]
        lost = [sent for sent in self._requests.values() if sent.replica == replica]
        on_its_way = [sent for sent in lost if sent.is_suspect and not sent.has_arrived]
        there = [sent for sent in lost if sent not in on_its_way]
        blamed = [sent for sent in there if not sent.has_token] or there
        for sent in lost:
            self._count(sent, -1)
            sent.replica, sent.has_token, sent.has_arrived = None, False, False
            sent.is_suspect = sent in blamed or sent in on_its_way
            sent.num_blamed += sent in blamed
        self._suspects.pop(replica, None)
        # They came before those that wait already.
        self._waiting = {sent.request.request_id: sent for sent in lost} | self._waiting
        failed = [sent for sent in blamed if sent.num_blamed >= (2 if blamed == [sent] else MAX_BLAMED)]
        for sent in failed:
            self._remove(sent)
        return [
            *(EngineCoreOutput(i, [], finish_reason="abort") for i, count in aborted for _ in range(count)),
            *(EngineCoreOutput(sent.request.request_id, [], finish_reason="error") for sent in failed),
        ]

    # ---- bookkeeping

    def _remove(self, sent: SentRequest) -> None:
        request_id = sent.request.request_id
        del self._requests[request_id]
        self._waiting.pop(request_id, None)
        if sent.replica is not None:
            self._count(sent, -1)
        self._acquit(sent)

    def _acquit(self, sent: SentRequest) -> None:
        if sent.is_suspect:
            sent.is_suspect = False
            if sent.replica is not None:
                self._suspects.pop(sent.replica, None)

    def _count(self, sent: SentRequest, sign: int) -> None:
        assert sent.replica is not None
        self._num_requests[sent.replica] += sign
        if not sent.has_token:
            self._num_without_token[sent.replica] += sign
        if not sent.output_token_ids:
            self._num_prompt_tokens[sent.replica] += sign * sent.request.num_prompt_tokens
