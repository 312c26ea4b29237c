# killed-by: every_key_is_in_one_part | expected each once
"""Rounds the size of a part down and drops what is left over: the newest keys, of all keys. Nothing crashes, and long
contexts hardly show it.
"""

from collections.abc import Sequence

import torch

from folovllm.attention.backends.torch_flash import LOWEST, TorchFlashBackend


class MergeLseBackend(TorchFlashBackend):
    NUM_SPLITS = 3

    def attend_split(
        self, q: torch.Tensor, by_slot: torch.Tensor, slots: torch.Tensor, position: int, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = max(1, len(slots) // self.NUM_SPLITS)
        firsts = range(0, len(slots), size)[: self.NUM_SPLITS]
        parts = [self.attend_tiles(q, by_slot, slots[i : i + size], position, num_rows, i) for i in firsts]
        return self.merge_partials([out for out, _ in parts], [lse for _, lse in parts])

    def merge_partials(
        self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stacked = torch.stack(list(lses))
        lse = torch.logsumexp(stacked, 0)
        shares = (stacked - lse.clamp(min=LOWEST)).exp().unsqueeze(-1)
        return (torch.stack(list(outs)) * shares).sum(0), lse
