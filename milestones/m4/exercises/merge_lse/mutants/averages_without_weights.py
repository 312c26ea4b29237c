# killed-by: the_heavier_part_counts_more | two thirds are in part 1
"""Takes the plain mean of the parts. It is right if all keys weigh the same, as with random small scores it nearly is;
docs/learn/04 computes what it costs.
"""

from collections.abc import Sequence

import torch

from folovllm.attention.backends.torch_flash import TorchFlashBackend


class MergeLseBackend(TorchFlashBackend):
    NUM_SPLITS = 3

    def attend_split(
        self, q: torch.Tensor, by_slot: torch.Tensor, slots: torch.Tensor, position: int, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = -(-len(slots) // self.NUM_SPLITS)
        firsts = range(0, len(slots), size)
        parts = [self.attend_tiles(q, by_slot, slots[i : i + size], position, num_rows, i) for i in firsts]
        return self.merge_partials([out for out, _ in parts], [lse for _, lse in parts])

    def merge_partials(
        self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lse = torch.logsumexp(torch.stack(list(lses)), 0)
        return torch.stack(list(outs)).mean(0), lse
