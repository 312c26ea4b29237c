# killed-by: large_scores_do_not_overflow | with lse around 1000 the answer is nan
"""Turns each lse back into its sum with exp, which is infinite from 89 on. Right on small numbers, and NaN on the
first head with large scores.
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
        sums = torch.stack(list(lses)).exp().unsqueeze(-1)
        total = sums.sum(0)
        return (torch.stack(list(outs)) * sums).sum(0) / total.clamp(min=1e-38), total.squeeze(-1).log()
