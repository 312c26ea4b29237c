# killed-by: the_heavier_part_counts_more | two thirds are in part 1
"""Takes the lse for a base-2 logarithm. FlashInfer's kernels return base 2, and vLLM's and SGLang's merges expect the
natural one: vLLM pull request 52796 and SGLang issue 40903 found answers that changed with every prefix hit.
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
        parts = [self.attend_tiles(q, by_slot, slots[i : i + size], position, num_rows, i) for i in firsts]
        return self.merge_partials([out for out, _ in parts], [lse for _, lse in parts])

    def merge_partials(
        self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stacked = torch.stack(list(lses))
        largest = stacked.amax(0).clamp(min=LOWEST)
        sums = torch.exp2(stacked - largest)
        total = sums.sum(0)
        shares = (sums / total.clamp(min=1e-38)).unsqueeze(-1)
        return (torch.stack(list(outs)) * shares).sum(0), largest + total.log2()
