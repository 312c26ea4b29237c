# killed-by: two_by_two_by_hand | expected 1.15
"""Fixes the column and moves no other: rounding to nearest with a detour. Everything runs, the checkpoint loads, and
only the error of the layers tells.
"""

import torch

from folovllm.quantize.gptq import GPTQ


class StepGPTQ(GPTQ):
    def column_order(self, hessian: torch.Tensor) -> torch.Tensor:
        if self.config.desc_act:
            return torch.argsort(hessian.diagonal(), descending=True, stable=True)
        return torch.arange(len(hessian))

    def inverse_root(self, hessian: torch.Tensor) -> torch.Tensor | None:
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            return None
        return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)

    def step(self, weight: torch.Tensor, column: int, rounded: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        error = (weight[:, column] - rounded) / root[column, column]
        weight[:, column] = rounded
        return error
