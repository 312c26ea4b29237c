# killed-by: blocks_lie_anywhere | a block that its request does not hold
"""Takes the first block and counts on from there. Right as long as the pool hands out neighbours.

This is the contiguous cache that paging replaces. With a fresh pool each test of one request passes.
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
        first = self.table[rows, 0].astype(np.int64)  # [num_tokens]
        return first * self.block_size + positions
