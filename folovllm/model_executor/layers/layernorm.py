"""RMSNorm, with the residual addition that always comes before it.

Milestone: M1. vLLM counterpart: vllm/model_executor/layers/layernorm.py. Left out: fused CUDA kernels (M4).
Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
"""

from typing import overload

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.model_executor.parameter import load_whole, new_parameter


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, with fp32 inside whatever x is."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = new_parameter(size, weight_loader=load_whole)  # [size]
        self.shape = (size,)
        self.eps = eps

    @overload
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """norm(x), or (norm(x + residual), x + residual). `residual` is overwritten: it is the running sum."""
        if residual is None:
            return F.rms_norm(x, self.shape, self.weight, self.eps)  # as x
        residual.add_(x)  # [num_tokens, size]; in place saves an allocation per norm
        return F.rms_norm(residual, self.shape, self.weight, self.eps), residual
