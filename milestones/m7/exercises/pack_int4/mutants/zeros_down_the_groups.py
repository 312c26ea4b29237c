# killed-by: zero_points_lie_along_the_outputs | expected 87654321
"""Packs zero points down the groups, as levels are packed down the inputs. Shapes only tell if there are few groups:
[groups / 8, outputs] is no shape of the format.
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
        filled = torch.zeros(-len(zeros) % (32 // self.bits), zeros.shape[1], dtype=zeros.dtype)
        return self.pack_rows(torch.cat([zeros - self.zero_offset, filled]))

    def unpack_zeros(self, packed: torch.Tensor) -> torch.Tensor:
        ones = sum(self.zero_offset << shift for shift in range(0, 32, self.bits))
        words = ((packed.long() + ones + 2**31) % 2**32 - 2**31).int()
        return self.unpack_rows(words).int()
