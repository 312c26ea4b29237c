# killed-by: a_large_pool_does_not_overflow | computed in int32
"""Multiplies in int32 and widens the product, which has overflowed by then.

vLLM issue 1486: with 64,000 blocks the index computed from the slot mapping no longer fitted into 32 bits.
"""

import numpy as np

from folovllm.worker.block_table import BlockTable as Reference


class BlockTable(Reference):
    def add_row(self, block_ids: list[int], row: int) -> None:
        self.table[row, : self.num_blocks_per_row[row]] = 0
        self.num_blocks_per_row[row] = 0
        self.append_row(block_ids, row)

    def append_row(self, block_ids: list[int], row: int) -> None:
        start = self.num_blocks_per_row[row]
        self.table[row, start : start + len(block_ids)] = block_ids
        self.num_blocks_per_row[row] += len(block_ids)

    def slot_mapping(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        blocks = self.table[rows, positions // self.block_size]  # [num_tokens]
        slots = blocks * np.int32(self.block_size) + (positions % self.block_size).astype(np.int32)
        return slots.astype(np.int64)
