# killed-by: the_root_of_the_inverse | expected [[0.8165, -0.4082]
"""Takes the Cholesky factor of H and not that of its inverse. Errors then move in the wrong direction and make things
worse; the paper and its code mention both matrices within three lines.
"""

import torch

from folovllm.quantize.gptq import GPTQ


class StepGPTQ(GPTQ):
    def column_order(self, hessian: torch.Tensor) -> torch.Tensor:
        if self.config.desc_act:
            return torch.argsort(hessian.diagonal(), descending=True, stable=True)
        return torch.arange(len(hessian))

    def inverse_root(self, hessian: torch.Tensor) -> torch.Tensor | None:
        _, failed = torch.linalg.cholesky_ex(hessian)
        if failed:
            return None
        return torch.linalg.cholesky(hessian, upper=True)

    def step(self, weight: torch.Tensor, column: int, rounded: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        error = (weight[:, column] - rounded) / root[column, column]
        weight[:, column:] -= torch.outer(error, root[column, column:])
        return error
