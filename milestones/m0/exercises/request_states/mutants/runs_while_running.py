# killed-by: other_moves_between_living_states_are_refused | RUNNING -> RUNNING was allowed
"""RUNNING -> RUNNING is let through as harmless. It hides a request that stands in the running list twice."""

from folovllm.request import Request as EngineRequest
from folovllm.request import RequestStatus as S

LEGAL = {(S.WAITING, S.RUNNING), (S.RUNNING, S.PREEMPTED), (S.PREEMPTED, S.RUNNING)}


class Request(EngineRequest):
    def set_status(self, status: S) -> None:
        ok = status == self.status == S.RUNNING or (self.status, status) in LEGAL or S.is_finished(status)
        assert ok and not S.is_finished(self.status), f"{self.request_id}: {self.status.name} -> {status.name}"
        self.status = status
