# killed-by: the_strongest_inputs_first | expected [1, 3, 2, 5, 0, 4]
"""Sorts ascending, so that the strongest inputs are rounded last, when no column is left to make up for them. argsort
sorts ascending unless it is told otherwise.
"""

import torch

from folovllm.quantize.gptq import GPTQ


class StepGPTQ(GPTQ):
    def column_order(self, hessian: torch.Tensor) -> torch.Tensor:
        if self.config.desc_act:
            return torch.argsort(hessian.diagonal(), stable=True)
        return torch.arange(len(hessian))

    def inverse_root(self, hessian: torch.Tensor) -> torch.Tensor | None:
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            return None
        return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)

    def step(self, weight: torch.Tensor, column: int, rounded: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        error = (weight[:, column] - rounded) / root[column, column]
        weight[:, column:] -= torch.outer(error, root[column, column:])
        return error
