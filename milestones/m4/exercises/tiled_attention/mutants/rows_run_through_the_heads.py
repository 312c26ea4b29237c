# killed-by: every_query_head_gets_the_same_mask | expected [[1, 1], [0, 1]] twice
"""Takes row r of the matrix for the query at position + r, though the rows of the second query head begin again. It is
right as long as every KV head has one query head, so it survives tests on models without grouped-query attention.
"""

import torch

from folovllm.attention.backends.torch_flash import TorchFlashBackend


class TiledAttentionBackend(TorchFlashBackend):
    def mask_future(self, scores: torch.Tensor, first_key: int, position: int, num_rows: int) -> None:
        keys = first_key + torch.arange(scores.shape[-1])
        queries = position + torch.arange(scores.shape[1])[:, None]
        scores.masked_fill_(keys > queries, float("-inf"))

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
