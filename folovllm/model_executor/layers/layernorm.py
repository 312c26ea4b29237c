"""RMSNorm, with the residual addition that always comes before it.

Milestone: M1; M4 may put a fused kernel into `impl`. vLLM counterpart: vllm/model_executor/layers/layernorm.py.
Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", eq. 4.
"""

from collections.abc import Callable
from typing import overload

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.model_executor.parameter import load_whole, new_parameter


def rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """norm(x), or, with a residual: residual += x, then norm(residual). All [..., size], weight [size]."""
    if residual is not None:
        x = residual.add_(x)  # [..., size]; in place saves an allocation per norm
    return F.rms_norm(x, weight.shape, weight, eps)  # [..., size]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, with fp32 inside whatever x is."""

    impl: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, float], torch.Tensor] = staticmethod(rms_norm)

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = new_parameter(size, weight_loader=load_whole)  # [size]
        self.eps = eps

    @overload
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...
    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """norm(x), or (norm(x + residual), x + residual). `residual` is overwritten: it is the running sum."""
        out = self.impl(x, residual, self.weight, self.eps)  # as x
        return out if residual is None else (out, residual)
