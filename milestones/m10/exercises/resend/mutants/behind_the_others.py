# killed-by: the_lost_go_before_those_that_wait | the order is
"""The lost requests queue up behind those that came later."""

from collections.abc import Iterable

from folovllm.engine.sent_requests import SentRequest
from folovllm.engine.sent_requests import SentRequests as Reference
from folovllm.outputs import EngineCoreOutput


class SentRequests(Reference):
    def receive(self, outputs: Iterable[EngineCoreOutput]) -> list[tuple[SentRequest, EngineCoreOutput]]:
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

    def lose(self, replica: int) -> list[EngineCoreOutput]:
        aborted = [(i, count) for i, (where, count) in self._leaving.items() if where == replica]
        ended = [EngineCoreOutput(i, [], finish_reason="abort") for i, count in aborted for _ in range(count)]
        for request_id, _ in aborted:
            del self._leaving[request_id]
        guilty = self._suspects.get(replica)
        if guilty is not None:
            ended.append(EngineCoreOutput(guilty.request.request_id, [], finish_reason="error"))
            self._remove(guilty)
        lost = [sent for sent in self._requests.values() if sent.replica == replica]
        for sent in lost:
            self._count(sent, -1)
            sent.replica, sent.is_suspect = None, guilty is None
        self._waiting |= {sent.request.request_id: sent for sent in lost}
        return ended
