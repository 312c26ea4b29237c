"""m4/tiled_attention: the loop over the tiles of keys, and the causal mask of one tile."""

import torch

from folovllm.attention.backends.torch_flash import TorchFlashBackend


class TiledAttentionBackend(TorchFlashBackend):
    """The backend torch_flash with your loop over the tiles."""

    def mask_future(self, scores: torch.Tensor, first_key: int, position: int, num_rows: int) -> None:
        """Sets to -inf, in place, the scores of keys after the query's own position.

        `scores` is [num_kv_heads, group * num_rows, tile]. Row r of each query head is at position + r, and column c is
        the key at first_key + c.
        """
        raise NotImplementedError("m4/tiled_attention: mask_future")

    def attend_tiles(
        self,
        q: torch.Tensor,
        by_slot: torch.Tensor,
        slots: torch.Tensor,
        position: int,
        num_rows: int,
        first_key: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (out, lse) of the queries `q` over the keys in `slots`, BLOCK_KV keys at a time.

        q         [num_kv_heads, group * num_rows, head_size], fp32, scaled; row r of each query head is at position + r
        by_slot   [2, num_slots, num_kv_heads, head_size], K and V
        slots     [num_keys]: where the keys at positions first_key, first_key + 1, ... are
        """
        raise NotImplementedError("m4/tiled_attention: attend_tiles")
