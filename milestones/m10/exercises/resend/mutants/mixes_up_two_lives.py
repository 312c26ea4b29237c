# killed-by: an_aborted_request_gets_no_more_tokens | expected none of either
"""Late tokens of an aborted request are given to the new request that has its id."""

from collections.abc import Iterable

from folovllm.engine.sent_requests import MAX_BLAMED, SentRequest
from folovllm.engine.sent_requests import SentRequests as Reference
from folovllm.outputs import EngineCoreOutput


class SentRequests(Reference):
    def receive(self, outputs: Iterable[EngineCoreOutput]) -> list[tuple[SentRequest, EngineCoreOutput]]:
        ended = []
        for output in outputs:
            if output.request_id in self._leaving and output.finished:
                self._confirm(output.request_id)
            elif (sent := self._requests.get(output.request_id)) is not None:
                self._take(sent, output)
                if output.finished:
                    ended.append((sent, output))
                    self._remove(sent)
        return ended

    def lose(self, replica: int) -> list[EngineCoreOutput]:
        aborted = [(i, count) for i, (where, count) in self._leaving.items() if where == replica]
        ended = [EngineCoreOutput(i, [], finish_reason="abort") for i, count in aborted for _ in range(count)]
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
        self._waiting = {sent.request.request_id: sent for sent in lost} | self._waiting
        for sent in blamed:
            if sent.num_blamed >= (2 if blamed == [sent] else MAX_BLAMED):
                ended.append(EngineCoreOutput(sent.request.request_id, [], finish_reason="error"))
                self._remove(sent)
        return ended
