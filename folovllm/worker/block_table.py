"""BlockTable: the worker's copy of which physical blocks hold each request, one row per request.

Milestone: M1. vLLM counterpart: vllm/v1/worker/block_table.py. A preallocated array: rows grow in place as requests do.
"""

import numpy as np


class BlockTable:
    """Rows of physical block ids, padded with the null block 0."""

    def __init__(self, max_num_reqs: int, max_num_blocks_per_req: int, block_size: int) -> None:
        self.block_size = block_size
        self.table = np.zeros((max_num_reqs, max_num_blocks_per_req), dtype=np.int32)
        self.num_blocks_per_row = np.zeros(max_num_reqs, dtype=np.int32)

    def add_row(self, block_ids: list[int], row: int) -> None:
        """Replace row `row`."""
        self.table[row, : self.num_blocks_per_row[row]] = 0
        self.num_blocks_per_row[row] = 0
        self.append_row(block_ids, row)

    def append_row(self, block_ids: list[int], row: int) -> None:
        if block_ids:
            start = self.num_blocks_per_row[row]
            self.table[row, start : start + len(block_ids)] = block_ids
            self.num_blocks_per_row[row] += len(block_ids)

    def move_row(self, source: int, destination: int) -> None:
        self.add_row(self.table[source, : self.num_blocks_per_row[source]].tolist(), destination)

    def slot_mapping(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Slot of each (row, position) pair, both [num_tokens].

        E.g. blocks of 4, row 0 = [7, 2]: positions 3, 4 -> slots 7 * 4 + 3 = 31, 2 * 4 + 0 = 8.
        """
        block_ids = self.table[rows, positions // self.block_size]  # [num_tokens]
        return block_ids.astype(np.int64) * self.block_size + positions % self.block_size
