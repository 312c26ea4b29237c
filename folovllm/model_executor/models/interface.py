"""CausalLM: what a model must offer the engine.

Milestone: M1, M9 (stages of a pipeline). vLLM counterpart: vllm/model_executor/models/interfaces_base.py
(VllmModelForTextGeneration) and IntermediateTensors in vllm/sequence.py.
"""

from typing import NamedTuple, Protocol, overload

import torch

from folovllm.attention.layer import Attention


class IntermediateTensors(NamedTuple):
    """What one stage of a pipeline hands to the next: the two inputs of its first layer."""

    hidden: torch.Tensor  # [num_tokens, hidden_size]
    residual: torch.Tensor  # [num_tokens, hidden_size]


class CausalLM(Protocol):
    """Called within a forward context, once `bind` has given each attention layer its backend and cache.

    A model that runs in one stage may leave `intermediate` out of its signature.
    """

    @overload
    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Both [num_tokens] -> hidden states [num_selected, hidden_size] of the context's `logits_indices`."""

    @overload
    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate: IntermediateTensors | None
    ) -> torch.Tensor | IntermediateTensors:
        """The same for a stage of a pipeline, which begins with the `intermediate` of the stage before it.

        A stage that is not the last returns its own, with all rows.
        """

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size]. Only the last stage is asked."""

    def attention_layers(self) -> list[Attention]:
        """In layer order."""
