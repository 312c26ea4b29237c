"""SiluAndMul: the gate of a SwiGLU MLP.

Milestone: M1; M4 may put a fused kernel into `impl`. vLLM counterpart: vllm/model_executor/layers/activation.py.
Left out: other activations. Source: Shazeer 2020, "GLU Variants Improve Transformer", section 2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)  # views
    return F.silu(gate).mul_(up)  # [num_tokens, size]


class SiluAndMul(nn.Module):
    """silu(gate) * up, where the merged linear before it left gate and up side by side."""

    impl: Callable[[torch.Tensor], torch.Tensor] = staticmethod(silu_and_mul)

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up [num_tokens, 2 * size] -> [num_tokens, size]."""
        return self.impl(gate_up)
