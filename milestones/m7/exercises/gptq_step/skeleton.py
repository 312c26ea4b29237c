"""m7/gptq_step: which column is rounded next, and how the others make up for its error."""

import torch

from folovllm.quantize.gptq import GPTQ


class StepGPTQ(GPTQ):
    """The engine's GPTQ with your order and your step."""

    def column_order(self, hessian: torch.Tensor) -> torch.Tensor:
        """Returns the order of the columns [input_size] int64: by falling diagonal of H if self.config.desc_act."""
        raise NotImplementedError("m7/gptq_step: column_order")

    def inverse_root(self, hessian: torch.Tensor) -> torch.Tensor | None:
        """Returns U (fp64, as H is), upper triangular with U^T U = H^-1, or None if H is not positive definite."""
        raise NotImplementedError("m7/gptq_step: inverse_root")

    def step(self, weight: torch.Tensor, column: int, rounded: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        """Fixes `column` of `weight` [output_size, n] at `rounded` [output_size] and updates the later ones, in place.

        root [n, n] is U. Returns the error in units of root[column, column], [output_size].
        """
        raise NotImplementedError("m7/gptq_step: step")
