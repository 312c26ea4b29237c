# killed-by: a_masked_tile_changes_nothing | exp(-inf - -inf) is NaN
"""Starts the maximum at -inf, as algorithm 1 of the FlashAttention paper is written. A row whose first tile is masked
whole then computes -inf - -inf. FlashAttention's kernels test for it (`Check_inf` in its softmax.h), because sliding
windows and chunks make such rows.
"""

import torch

from folovllm.attention.backends.torch_flash import SoftmaxState, TorchFlashBackend


class OnlineSoftmaxBackend(TorchFlashBackend):
    def start_softmax(self, q: torch.Tensor) -> SoftmaxState:
        row_max = torch.full_like(q[..., :1], float("-inf"))
        return SoftmaxState(row_max, torch.zeros_like(row_max), torch.zeros_like(q))

    def update_softmax(self, state: SoftmaxState, scores: torch.Tensor, value: torch.Tensor) -> SoftmaxState:
        new_max = torch.maximum(state.row_max, scores.amax(-1, keepdim=True))
        p, correction = (scores - new_max).exp(), (state.row_max - new_max).exp()
        return SoftmaxState(
            new_max, state.row_sum * correction + p.sum(-1, keepdim=True), state.acc * correction + p @ value
        )

    def finish_softmax(self, state: SoftmaxState) -> tuple[torch.Tensor, torch.Tensor]:
        return state.acc / state.row_sum.clamp(min=1.0), (state.row_max + state.row_sum.log()).squeeze(-1)
