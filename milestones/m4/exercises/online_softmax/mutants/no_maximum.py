# killed-by: extreme_scores_do_not_overflow | only differences count
"""Sums exp(score) as it is and subtracts no maximum. It is right on small random scores, and real models have scores
of several hundred in some heads; fp32 overflows at 88.
"""

import torch

from folovllm.attention.backends.torch_flash import SoftmaxState, TorchFlashBackend


class OnlineSoftmaxBackend(TorchFlashBackend):
    def start_softmax(self, q: torch.Tensor) -> SoftmaxState:
        row_max = torch.full_like(q[..., :1], torch.finfo(torch.float32).min)
        return SoftmaxState(row_max, torch.zeros_like(row_max), torch.zeros_like(q))

    def update_softmax(self, state: SoftmaxState, scores: torch.Tensor, value: torch.Tensor) -> SoftmaxState:
        new_max = torch.maximum(state.row_max, scores.amax(-1, keepdim=True))
        total = state.row_sum * state.row_max.clamp(min=-1e30).exp() + scores.exp().sum(-1, keepdim=True)
        acc = state.acc * state.row_max.clamp(min=-1e30).exp() + scores.exp() @ value
        return SoftmaxState(new_max, total / new_max.exp(), acc / new_max.exp())

    def finish_softmax(self, state: SoftmaxState) -> tuple[torch.Tensor, torch.Tensor]:
        return state.acc / state.row_sum, (state.row_max + state.row_sum.log()).squeeze(-1)
