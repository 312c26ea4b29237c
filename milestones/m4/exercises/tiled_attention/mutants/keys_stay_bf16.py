# killed-by: a_cache_in_bf16 | BFloat16
"""Multiplies with keys and values as the cache holds them. An fp32 cache, which most tests have, hides it, and the
first bf16 model stops with a message about dtypes."""

import torch

from folovllm.attention.backends.torch_flash import TorchFlashBackend


class TiledAttentionBackend(TorchFlashBackend):
    """The backend torch_flash with your loop over the tiles."""

    def mask_future(self, scores: torch.Tensor, first_key: int, position: int, num_rows: int) -> None:
        rows = torch.arange(scores.shape[1]) % num_rows
        query_pos = position + rows
        key_pos = first_key + torch.arange(scores.shape[2])
        scores.masked_fill_(key_pos[None, :] > query_pos[:, None], float("-inf"))

    def attend_tiles(self, q, by_slot, slots, position, num_rows, first_key=0):
        state = self.start_softmax(q)
        K, V = by_slot
        for i in range(0, len(slots), self.BLOCK_KV):
            s = slots[i : i + self.BLOCK_KV]
            k = K[s].transpose(0, 1)
            v = V[s].transpose(0, 1)
            scores = q @ k.transpose(1, 2)
            self.mask_future(scores, first_key + i, position, num_rows)
            state = self.update_softmax(state, scores, v)
        return self.finish_softmax(state)
