# killed-by: every_key_is_in_one_part | first_key was
"""Does not tell a part where its keys begin, so that every part takes itself for the beginning of the sequence. A
decode token sees everything anyway and comes out right; a chunk of a prompt sees its own future.
"""

from collections.abc import Sequence

import torch

from folovllm.attention.backends.torch_flash import LOWEST, TorchFlashBackend


class MergeLseBackend(TorchFlashBackend):
    NUM_SPLITS = 3

    def attend_split(
        self, q: torch.Tensor, by_slot: torch.Tensor, slots: torch.Tensor, position: int, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = -(-len(slots) // self.NUM_SPLITS)
        firsts = range(0, len(slots), size)
        parts = [self.attend_tiles(q, by_slot, slots[i : i + size], position, num_rows) for i in firsts]
        return self.merge_partials([out for out, _ in parts], [lse for _, lse in parts])

    def merge_partials(
        self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stacked = torch.stack(list(lses))
        lse = torch.logsumexp(stacked, 0)
        shares = (stacked - lse.clamp(min=LOWEST)).exp().unsqueeze(-1)
        return (torch.stack(list(outs)) * shares).sum(0), lse
