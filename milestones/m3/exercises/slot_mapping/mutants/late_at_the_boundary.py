# killed-by: the_next_block_begins_at_a_multiple | position 4
"""Looks for the block of the token before. At a multiple of the block size that is the wrong block.

The first token of a new block is written over the first one of the old. MinivLLM issue 75 and nano-vllm issues 150 and
240 argue about this boundary: whether `len % block_size` must be compared with 0 or with 1.
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
        blocks = self.table[rows, np.maximum(positions - 1, 0) // self.block_size].astype(np.int64)  # [num_tokens]
        return blocks * self.block_size + positions % self.block_size
