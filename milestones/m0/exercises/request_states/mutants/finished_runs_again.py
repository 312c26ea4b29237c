# killed-by: a_finished_request_never_moves_again | was allowed
"""A finished request can be scheduled again, because the test asks only for known illegal moves.

The engine then writes into blocks that belong to another request by now.
"""

from folovllm.request import Request as EngineRequest
from folovllm.request import RequestStatus as S

LEGAL = {(S.WAITING, S.RUNNING), (S.RUNNING, S.PREEMPTED), (S.PREEMPTED, S.RUNNING)}


class Request(EngineRequest):
    def set_status(self, status: S) -> None:
        alive = (S.WAITING, S.RUNNING, S.PREEMPTED)
        if self.status in alive and status in alive:
            assert (self.status, status) in LEGAL, f"{self.request_id}: {self.status.name} -> {status.name}"
        self.status = status
