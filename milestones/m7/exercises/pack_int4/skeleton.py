"""m7/pack_int4: levels and zero points in 32-bit words, as AutoGPTQ lays them out."""

import torch

from folovllm.gptq_config import WORD_BITS  # noqa: F401 - 32
from folovllm.model_executor.layers.quantization.packing import Packing


class Int4Packing(Packing):
    """Packs values of self.bits (2, 4 or 8) bits; a stored zero point lacks self.zero_offset."""

    def pack_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Integers [n, columns] in 0 .. 2**bits - 1 -> int32 [n * bits / 32, columns], the first value lowest."""
        raise NotImplementedError("m7/pack_int4: pack_rows")

    def unpack_rows(self, packed: torch.Tensor) -> torch.Tensor:
        """int32 [m, columns] -> uint8 [m * 32 / bits, columns]."""
        raise NotImplementedError("m7/pack_int4: unpack_rows")

    def pack_zeros(self, zeros: torch.Tensor) -> torch.Tensor:
        """Zero points [num_groups, n] -> int32 [num_groups, n * bits / 32], each minus zero_offset, along the row."""
        raise NotImplementedError("m7/pack_int4: pack_zeros")

    def unpack_zeros(self, packed: torch.Tensor) -> torch.Tensor:
        """int32 [num_groups, m] -> zero points [num_groups, m * 32 / bits] int32; zero_offset is added to the words."""
        raise NotImplementedError("m7/pack_int4: unpack_zeros")
