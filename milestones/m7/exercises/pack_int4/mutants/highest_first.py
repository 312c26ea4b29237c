# killed-by: the_first_value_is_lowest | expected F2416326
"""Puts the first value into the highest nibble, as one writes numbers down. Its own round trip is perfect, and no
other tool reads the file: AWQ checkpoints have an order of their own, and readers that mix the two up load and talk
nonsense.
"""

import torch

from folovllm.model_executor.layers.quantization.packing import Packing


class Int4Packing(Packing):
    def pack_rows(self, values: torch.Tensor) -> torch.Tensor:
        values = values.long().unflatten(0, (-1, 32 // self.bits))
        words = torch.zeros_like(values[:, 0])
        for i in range(values.shape[1]):
            words |= values[:, i] << (32 - self.bits - i * self.bits)
        return ((words + 2**31) % 2**32 - 2**31).int()

    def unpack_rows(self, packed: torch.Tensor) -> torch.Tensor:
        shifts = range(0, 32, self.bits)
        values = torch.stack([packed.long() >> (32 - self.bits - shift) & (2**self.bits - 1) for shift in shifts], 1)
        return values.flatten(0, 1).to(torch.uint8)

    def pack_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        return self.pack_rows((zeros - self.zero_offset).t()).t().contiguous()

    def unpack_zeros(self, packed: torch.Tensor) -> torch.Tensor:
        ones = sum(self.zero_offset << shift for shift in range(0, 32, self.bits))
        words = ((packed.long() + ones + 2**31) % 2**32 - 2**31).int()
        return self.unpack_rows(words.t()).t().int()
