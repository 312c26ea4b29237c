# killed-by: a_larger_score_corrects_what_was_summed | the terms of the first tile carry exp(-3)
"""Sums up tiles without the correction. It is the step that first versions of hand-written kernels forget, and no test
with a single tile finds it; notebook 05 shows what it does to the weights.
"""

import torch

from folovllm.attention.backends.torch_flash import LOWEST, SoftmaxState, TorchFlashBackend


class OnlineSoftmaxBackend(TorchFlashBackend):
    def start_softmax(self, q: torch.Tensor) -> SoftmaxState:
        row_max = torch.full_like(q[..., :1], LOWEST)
        return SoftmaxState(row_max, torch.zeros_like(row_max), torch.zeros_like(q))

    def update_softmax(self, state: SoftmaxState, scores: torch.Tensor, value: torch.Tensor) -> SoftmaxState:
        new_max = torch.maximum(state.row_max, scores.amax(-1, keepdim=True))
        p = (scores - new_max).exp()
        return SoftmaxState(new_max, state.row_sum + p.sum(-1, keepdim=True), state.acc + p @ value)

    def finish_softmax(self, state: SoftmaxState) -> tuple[torch.Tensor, torch.Tensor]:
        return state.acc / state.row_sum.clamp(min=1.0), (state.row_max + state.row_sum.log()).squeeze(-1)
