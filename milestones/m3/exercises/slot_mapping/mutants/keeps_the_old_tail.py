# killed-by: a_row_forgets_its_last_request | a request that has ended
"""Overwrites the beginning of a row and leaves the rest, which names blocks of a request that has ended.

vLLM issue 53982: a kernel read entries of the block table that the sequence does not have.
"""

import numpy as np

from folovllm.worker.block_table import BlockTable as Reference


class BlockTable(Reference):
    def add_row(self, block_ids: list[int], row: int) -> None:
        self.num_blocks_per_row[row] = 0
        self.append_row(block_ids, row)

    def append_row(self, block_ids: list[int], row: int) -> None:
        start = self.num_blocks_per_row[row]
        self.table[row, start : start + len(block_ids)] = block_ids
        self.num_blocks_per_row[row] += len(block_ids)

    def slot_mapping(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        blocks = self.table[rows, positions // self.block_size].astype(np.int64)  # [num_tokens]
        return blocks * self.block_size + positions % self.block_size
