# killed-by: a_row_that_sees_nothing_is_zero | expected 0 and -inf
"""Replaces -inf by the lowest number, so that a row that sees nothing has the weight 1 for every masked key: its
answer is the mean of values that it must not see. PyTorch issue 41508 reports NaN for rows that are masked whole, and
the workaround proposed there is this one; a later comment shows what it computes.
"""

import torch

from folovllm.attention.backends.torch_flash import LOWEST, SoftmaxState, TorchFlashBackend


class OnlineSoftmaxBackend(TorchFlashBackend):
    def start_softmax(self, q: torch.Tensor) -> SoftmaxState:
        row_max = torch.full_like(q[..., :1], LOWEST)
        return SoftmaxState(row_max, torch.zeros_like(row_max), torch.zeros_like(q))

    def update_softmax(self, state: SoftmaxState, scores: torch.Tensor, value: torch.Tensor) -> SoftmaxState:
        scores = scores.clamp(min=LOWEST)
        new_max = torch.maximum(state.row_max, scores.amax(-1, keepdim=True))
        p, correction = (scores - new_max).exp(), (state.row_max - new_max).exp()
        return SoftmaxState(
            new_max, state.row_sum * correction + p.sum(-1, keepdim=True), state.acc * correction + p @ value
        )

    def finish_softmax(self, state: SoftmaxState) -> tuple[torch.Tensor, torch.Tensor]:
        return state.acc / state.row_sum.clamp(min=1.0), (state.row_max + state.row_sum.log()).squeeze(-1)
