# killed-by: zero_points_of_v1_lack_one | of 77777777
"""Stores and reads zero points as they are, in a v1 file too. The round trip is perfect, and every weight of every
other tool's file is one scale off; vLLM issue 26343 shows the mirror image, v2 files read as v1, with an answer of
exclamation marks.
"""

import torch

from folovllm.model_executor.layers.quantization.packing import Packing


class Int4Packing(Packing):
    def pack_rows(self, values: torch.Tensor) -> torch.Tensor:
        values = values.long().unflatten(0, (-1, 32 // self.bits))
        words = torch.zeros_like(values[:, 0])
        for i in range(values.shape[1]):
            words |= values[:, i] << (i * self.bits)
        return ((words + 2**31) % 2**32 - 2**31).int()

    def unpack_rows(self, packed: torch.Tensor) -> torch.Tensor:
        shifts = range(0, 32, self.bits)
        values = torch.stack([packed.long() >> shift & (2**self.bits - 1) for shift in shifts], 1)
        return values.flatten(0, 1).to(torch.uint8)

    def pack_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        return self.pack_rows(zeros.t()).t().contiguous()

    def unpack_zeros(self, packed: torch.Tensor) -> torch.Tensor:
        return self.unpack_rows(packed.t()).t().int()
