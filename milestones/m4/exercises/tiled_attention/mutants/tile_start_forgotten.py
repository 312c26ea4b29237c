# killed-by: a_whole_prompt | it sees keys of the future
"""Counts the keys of every tile from zero. With one tile all is well, and each later tile is treated as if it were the
first: its keys seem to lie in the past. nano-vllm's commit 25794a1 mends a mask that was not counted from the chunk
boundary, which is of this family.
"""

import torch

from folovllm.attention.backends.torch_flash import TorchFlashBackend


class TiledAttentionBackend(TorchFlashBackend):
    def mask_future(self, scores: torch.Tensor, first_key: int, position: int, num_rows: int) -> None:
        keys = first_key + torch.arange(scores.shape[-1])
        queries = position + torch.arange(num_rows)[:, None]
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
            self.mask_future(scores, first_key, position, num_rows)
            state = self.update_softmax(state, scores, value.transpose(0, 1))
        return self.finish_softmax(state)
