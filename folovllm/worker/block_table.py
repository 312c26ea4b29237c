"""BlockTable: the worker's copy of which physical blocks hold each request, one row per request.

Milestone: M1 (one block per request), M3 (rows that grow). vLLM counterpart: vllm/v1/worker/block_table.py. It is a
preallocated array, in which a row grows in place as its request does. The input batch builds it as the part
`worker.block_table`. Left out: a table per KV group, block ids on the GPU.
"""

import numpy as np


class BlockTable:
    """Rows of physical block ids, padded with the null block 0."""

    def __init__(self, max_num_reqs: int, max_num_blocks_per_req: int, block_size: int) -> None:
        self.block_size = block_size
        self.table = np.zeros((max_num_reqs, max_num_blocks_per_req), dtype=np.int32)
        self.num_blocks_per_row = np.zeros(max_num_reqs, dtype=np.int32)

    def add_row(self, block_ids: list[int], row: int) -> None:
        """Makes `row` the row of a request that holds `block_ids`, whatever request had the row before."""
        self.table[row, : self.num_blocks_per_row[row]] = 0
        self.num_blocks_per_row[row] = 0
        self.append_row(block_ids, row)

    def append_row(self, block_ids: list[int], row: int) -> None:
        """Adds the blocks that the request of `row` has newly got, behind those that it holds."""
        if block_ids:
            start = self.num_blocks_per_row[row]
            self.table[row, start : start + len(block_ids)] = block_ids
            self.num_blocks_per_row[row] += len(block_ids)

    def move_row(self, source: int, destination: int) -> None:
        """Copies row `source` over row `destination`."""
        self.add_row(self.table[source, : self.num_blocks_per_row[source]].tolist(), destination)

    def slot_mapping(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Returns the slot of each (row, position) pair, both [num_tokens].

        E.g. blocks of 4, row 0 = [7, 2]: positions 3, 4 -> slots 7 * 4 + 3 = 31, 2 * 4 + 0 = 8.
        """
        block_ids = self.table[rows, positions // self.block_size]  # [num_tokens]
        return block_ids.astype(np.int64) * self.block_size + positions % self.block_size
