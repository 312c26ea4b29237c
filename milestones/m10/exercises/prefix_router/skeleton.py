"""m10/prefix_router: which of several engines computes a request."""

from collections.abc import Sequence

from folovllm.engine.router import LeastLoadedRouter, ReplicaLoad  # noqa: F401 - you will need the first one
from folovllm.engine.router import PrefixRouter as Reference
from folovllm.request import Request


class PrefixRouter(Reference):
    """Inherited: known, block_names(request, output_token_ids), max_lead and cost(load)."""

    def route(self, request: Request, loads: Sequence[ReplicaLoad]) -> int:
        """Returns the number of one of the replicas in `loads`. Changes nothing."""
        raise NotImplementedError("m10/prefix_router: route")

    def started(self, request: Request, replica: int) -> None:
        """The request has been sent to `replica`."""
        raise NotImplementedError("m10/prefix_router: started")

    def finished(self, request: Request, replica: int, output_token_ids: Sequence[int]) -> None:
        """The request has ended in `replica`, after these tokens."""
        raise NotImplementedError("m10/prefix_router: finished")

    def forget(self, replica: int) -> None:
        """The cache of `replica` is empty now."""
        raise NotImplementedError("m10/prefix_router: forget")
