"""m0/request_states: which moves between the states of a request are legal."""

from folovllm.request import Request as EngineRequest
from folovllm.request import RequestStatus


class Request(EngineRequest):
    def set_status(self, status: RequestStatus) -> None:
        """Moves the request from `self.status` to `status`.

        If the move is illegal, raises AssertionError with a message of the form
        "{self.request_id}: {self.status.name} -> {status.name}", and self.status stays as it was.

        The states: WAITING, RUNNING, PREEMPTED, and four finished ones (RequestStatus.is_finished tells them apart).
        """
        raise NotImplementedError("m0/request_states: set_status")
