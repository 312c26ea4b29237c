# killed-by: fixed_columns_stay | expected them unchanged
"""Updates every column with H^-1 of all inputs, as if all were still free. Columns that are fixed leave their levels
again: OBQ removes a row and a column from H^-1 after every step, and without that the formula is wrong from the second
step on.
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
        inverse = root.t() @ root
        error_all = (weight[:, column] - rounded) / inverse[column, column]
        weight -= torch.outer(error_all, inverse[column])
        return error
