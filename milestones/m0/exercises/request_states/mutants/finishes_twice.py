# killed-by: a_finished_request_never_moves_again | FINISHED_STOPPED -> FINISHED_STOPPED was allowed
"""A finished request can finish again: an abort that comes late replaces the reason, and the blocks are freed twice."""

from folovllm.request import Request as EngineRequest
from folovllm.request import RequestStatus as S

LEGAL = {(S.WAITING, S.RUNNING), (S.RUNNING, S.PREEMPTED), (S.PREEMPTED, S.RUNNING)}


class Request(EngineRequest):
    def set_status(self, status: S) -> None:
        ok = (self.status, status) in LEGAL or S.is_finished(status)
        assert ok, f"{self.request_id}: {self.status.name} -> {status.name}"
        self.status = status
