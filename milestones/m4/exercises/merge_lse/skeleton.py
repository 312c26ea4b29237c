"""m4/merge_lse: cut the keys into parts, attend to each alone, and merge the answers."""

from collections.abc import Sequence

import torch

from folovllm.attention.backends.torch_flash import TorchFlashBackend


class MergeLseBackend(TorchFlashBackend):
    """The backend torch_flash with your split-KV."""

    NUM_SPLITS = 3

    def attend_split(
        self, q: torch.Tensor, by_slot: torch.Tensor, slots: torch.Tensor, position: int, num_rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (out, lse) of the queries `q` over the keys in `slots`, cut into at most NUM_SPLITS equal parts.

        Each part is a call of self.attend_tiles, which also wants the position of the part's first key.
        """
        raise NotImplementedError("m4/merge_lse: attend_split")

    def merge_partials(
        self, outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (out [..., head_size], lse [...]) over all keys, from those of parts of the keys.

        A part that saw no key (lse -inf) has no weight. Where no part saw any key, out is 0 and lse is -inf.
        """
        raise NotImplementedError("m4/merge_lse: merge_partials")
