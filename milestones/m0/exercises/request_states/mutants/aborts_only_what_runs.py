# killed-by: a_request_can_finish_from_every_living_state | WAITING -> FINISHED_STOPPED was refused
"""Only a running request can finish, as a textbook diagram of a process says. An abort comes at any time."""

from folovllm.request import Request as EngineRequest
from folovllm.request import RequestStatus as S

LEGAL = {(S.WAITING, S.RUNNING), (S.RUNNING, S.PREEMPTED), (S.PREEMPTED, S.RUNNING)}


class Request(EngineRequest):
    def set_status(self, status: S) -> None:
        ok = (self.status, status) in LEGAL or (self.status == S.RUNNING and S.is_finished(status))
        assert ok, f"{self.request_id}: {self.status.name} -> {status.name}"
        self.status = status
