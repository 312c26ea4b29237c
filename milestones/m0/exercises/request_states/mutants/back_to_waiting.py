# killed-by: legal_moves_are_made | PREEMPTED -> RUNNING was refused
"""A preempted request must go back to WAITING before it can run again.

In V0 of vLLM, preemption by recomputation set the status to WAITING, and a SWAPPED state was for requests whose blocks
were copied to the CPU. Many diagrams still show both. V1 has PREEMPTED, and from there a request runs again.
"""

from folovllm.request import Request as EngineRequest
from folovllm.request import RequestStatus as S

LEGAL = {(S.WAITING, S.RUNNING), (S.RUNNING, S.PREEMPTED), (S.PREEMPTED, S.WAITING)}


class Request(EngineRequest):
    def set_status(self, status: S) -> None:
        ok = (self.status, status) in LEGAL or S.is_finished(status)
        assert ok and not S.is_finished(self.status), f"{self.request_id}: {self.status.name} -> {status.name}"
        self.status = status
