# killed-by: a_zero_of_zero_borrowed | a 0 borrows from
"""Adds the one of v1 after unpacking, value by value. It differs only where a zero point is 0, which asymmetric files
have: AutoGPTQ pull requests 559 and 640 discuss what became of them.
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
        return self.pack_rows((zeros - self.zero_offset).t()).t().contiguous()

    def unpack_zeros(self, packed: torch.Tensor) -> torch.Tensor:
        return self.unpack_rows(packed.t()).t().int() + self.zero_offset
