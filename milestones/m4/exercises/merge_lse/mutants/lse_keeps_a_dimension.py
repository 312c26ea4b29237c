# killed-by: every_row_has_its_own_shares | the result has the shapes of a part
"""Returns the lse with the dimension that the shares were given for the product with the answers. Its numbers are
right, and a merge of merged parts gets shapes that do not fit.
"""

import torch

from folovllm.attention.backends.torch_flash import TorchFlashBackend


class MergeLseBackend(TorchFlashBackend):
    """The backend torch_flash with your split-KV."""

    NUM_SPLITS = 3

    def attend_split(self, q, by_slot, slots, position, num_rows):
        n = -(-len(slots) // self.NUM_SPLITS)
        outs, lses = [], []
        for i in range(self.NUM_SPLITS):
            part = slots[i * n : (i + 1) * n if i < self.NUM_SPLITS - 1 else None]
            if not len(part):
                break
            out, lse = self.attend_tiles(q, by_slot, part, position, num_rows, i * n)
            outs.append(out)
            lses.append(lse)
        return self.merge_partials(outs, lses)

    def merge_partials(self, outs, lses):
        lse_all = torch.logsumexp(torch.stack(lses), 0)
        weights = [torch.nan_to_num(torch.exp(lse - lse_all)) for lse in lses]
        out = sum(w[..., None] * o for w, o in zip(weights, outs, strict=True))
        return out, lse_all[..., None]
