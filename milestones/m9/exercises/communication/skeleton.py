"""m9/communication: how often, and with how many bytes, the ranks of a model talk to each other in a forward pass."""

from folovllm.communication_plan import ALL_GATHER, ALL_REDUCE, SEND  # noqa: F401 - the keys of both results
from folovllm.communication_plan import CommunicationPlan as _Real
from folovllm.utils import cdiv  # noqa: F401 - divides and rounds up


class CommunicationPlan(_Real):
    """What one rank hands to its groups in a forward pass."""

    def calls(self, num_sampled: int) -> dict[str, int]:
        """Returns the number of calls of a pass that computes the logits of `num_sampled` tokens."""
        raise NotImplementedError("m9/communication: calls")

    def bytes(self, num_tokens: int, num_sampled: int) -> dict[str, int]:
        """Returns the bytes that the rank hands over in a pass of `num_tokens` tokens."""
        raise NotImplementedError("m9/communication: bytes")
