# killed-by: every_row_has_its_own_numbers | at non-singleton dimension
"""Takes the maximum of a tile without keepdim=True. With one row and one KV head broadcasting
hides it; a decode step, which has one row and several KV heads, gets a state of another shape, and no error here.
"""

import torch

from folovllm.attention.backends.torch_flash import SoftmaxState, TorchFlashBackend


class OnlineSoftmaxBackend(TorchFlashBackend):
    """The backend torch_flash with your softmax."""

    def start_softmax(self, q: torch.Tensor) -> SoftmaxState:
        """Returns the state of the queries `q` [num_kv_heads, rows, head_size] before the first key."""
        h, r, d = q.shape
        return SoftmaxState(
            torch.full((h, r, 1), torch.finfo(torch.float32).min), torch.zeros(h, r, 1), torch.zeros(h, r, d)
        )

    def update_softmax(self, state: SoftmaxState, scores: torch.Tensor, value: torch.Tensor) -> SoftmaxState:
        row_max, row_sum, acc = state
        new_m = torch.maximum(row_max, scores.amax(-1))
        factor = torch.exp(row_max - new_m)
        p = torch.exp(scores - new_m)
        return SoftmaxState(new_m, row_sum * factor + p.sum(-1, keepdim=True), acc * factor + p @ value)

    def finish_softmax(self, state: SoftmaxState) -> tuple[torch.Tensor, torch.Tensor]:
        row_max, row_sum, acc = state
        return acc / row_sum.clamp(min=1e-30), (row_max + torch.log(row_sum)).squeeze(-1)
