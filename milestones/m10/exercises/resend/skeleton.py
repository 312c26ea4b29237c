"""m10/resend: what follows from a replica's outputs, and from its death."""

from collections.abc import Iterable

from folovllm.engine.sent_requests import MAX_BLAMED, SentRequest  # noqa: F401 - you will need the first one
from folovllm.engine.sent_requests import SentRequests as Reference
from folovllm.outputs import EngineCoreOutput


class SentRequests(Reference):
    """Inherited: _requests, _waiting, _leaving, _suspects, _take, _remove, _confirm and _count, see the README."""

    def receive(self, outputs: Iterable[EngineCoreOutput]) -> list[tuple[SentRequest, EngineCoreOutput]]:
        """Takes in what a replica has sent. Returns the requests that have ended, each with its last output."""
        raise NotImplementedError("m10/resend: receive")

    def lose(self, replica: int) -> list[EngineCoreOutput]:
        """`replica` has died. Returns the last outputs of the requests that end with it. The others wait."""
        raise NotImplementedError("m10/resend: lose")
