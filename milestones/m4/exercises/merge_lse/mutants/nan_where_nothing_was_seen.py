# killed-by: a_part_that_saw_nothing_has_no_weight | expected 0 and -inf
"""Subtracts -inf from -inf where no part saw any key. vLLM's merge_attn_states did (issue 27491, "NaN's in MLA with
chunked-prefill", and pull request 39148): a row may see nothing of several parts under load, and the NaN reached the
logprobs.
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
        stacked = torch.stack(list(lses))
        lse = torch.logsumexp(stacked, 0)
        return (torch.stack(list(outs)) * (stacked - lse).exp().unsqueeze(-1)).sum(0), lse
