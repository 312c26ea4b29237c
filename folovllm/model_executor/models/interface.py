"""CausalLM: what a model must offer the engine.

Milestone: M1. vLLM counterpart: vllm/model_executor/models/interfaces_base.py (VllmModelForTextGeneration).
"""

from typing import Protocol

import torch

from folovllm.attention.layer import Attention


class CausalLM(Protocol):
    """Called within a forward context, once `bind` has given each attention layer its backend and cache."""

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Both [num_tokens] -> hidden states [num_selected, hidden_size] of the context's `logits_indices`."""

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] -> [n, vocab_size]."""

    def attention_layers(self) -> list[Attention]:
        """In layer order."""
