# killed-by: a_sequence_begins_in_its_first_block | positions 0 to 3
"""Counts positions from 1, as a length does. Every token is written one slot too far.

nano-vllm commit f5b4840 (pull 67): the first generated token was computed at position len instead of len - 1.
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
        positions = positions + 1
        blocks = self.table[rows, positions // self.block_size].astype(np.int64)  # [num_tokens]
        return blocks * self.block_size + positions % self.block_size
