# killed-by: a_refused_move_changes_nothing_and_names_itself | the check comes first
"""Assigns the new status and checks it afterwards, so a refused move has happened all the same."""

from folovllm.request import Request as EngineRequest
from folovllm.request import RequestStatus as S

LEGAL = {(S.WAITING, S.RUNNING), (S.RUNNING, S.PREEMPTED), (S.PREEMPTED, S.RUNNING)}


class Request(EngineRequest):
    def set_status(self, status: S) -> None:
        before, self.status = self.status, status
        ok = (before, status) in LEGAL or S.is_finished(status)
        assert ok and not S.is_finished(before), f"{self.request_id}: {before.name} -> {status.name}"
