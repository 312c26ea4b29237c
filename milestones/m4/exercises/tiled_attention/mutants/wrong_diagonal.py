# killed-by: the_mask_by_hand | queries from position 6 on
"""Puts the diagonal at the top left, as if the first new token were the first of the sequence. It is what
is_causal=True of PyTorch's scaled_dot_product_attention means, and FlashAttention changed its own meaning from top
left to bottom right in version 2.1. Whole prompts come out right, and every chunk with a cached prefix is wrong.
"""

import torch

from folovllm.attention.backends.torch_flash import TorchFlashBackend


class TiledAttentionBackend(TorchFlashBackend):
    def mask_future(self, scores: torch.Tensor, first_key: int, position: int, num_rows: int) -> None:
        keys = first_key + torch.arange(scores.shape[-1])
        queries = torch.arange(num_rows)[:, None]
        scores.view(scores.shape[0], -1, num_rows, scores.shape[-1]).masked_fill_(keys > queries, float("-inf"))

    def attend_tiles(
        self,
        q: torch.Tensor,
        by_slot: torch.Tensor,
        slots: torch.Tensor,
        position: int,
        num_rows: int,
        first_key: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.start_softmax(q)
        for start in range(0, slots.shape[0], self.BLOCK_KV):
            key, value = by_slot[:, slots[start : start + self.BLOCK_KV]].float()
            scores = torch.bmm(q, key.permute(1, 2, 0))
            self.mask_future(scores, first_key + start, position, num_rows)
            state = self.update_softmax(state, scores, value.transpose(0, 1))
        return self.finish_softmax(state)
