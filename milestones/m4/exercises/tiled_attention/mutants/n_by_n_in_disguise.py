# killed-by: the_score_matrix_is_never_built | the matrix of scores was built after all
"""Computes the scores of all keys at once and cuts the finished matrix into tiles. Every answer is right, and the
memory is that of the formula.
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
        key, value = by_slot[:, slots].float()
        scores = torch.bmm(q, key.permute(1, 2, 0))
        self.mask_future(scores, first_key, position, num_rows)
        state = self.start_softmax(q)
        for start in range(0, slots.shape[0], self.BLOCK_KV):
            tile = slice(start, start + self.BLOCK_KV)
            state = self.update_softmax(state, scores[..., tile].clone(), value[tile].transpose(0, 1))
        return self.finish_softmax(state)
