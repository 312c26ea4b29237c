"""m3/slot_mapping: rows of block ids, and from them the slot of each token. The reference supplies the rest."""

import numpy as np

from folovllm.worker.block_table import BlockTable as Reference


class BlockTable(Reference):
    """Your table: `self.table` [max_num_reqs, max_num_blocks_per_req] int32, padded with the null block 0."""

    def add_row(self, block_ids: list[int], row: int) -> None:
        """Makes `row` the row of a request that holds `block_ids`. What an earlier request left there becomes 0."""
        raise NotImplementedError("m3/slot_mapping: add_row")

    def append_row(self, block_ids: list[int], row: int) -> None:
        """Adds `block_ids`, which may be empty, behind the blocks of `row`; counts them in num_blocks_per_row."""
        raise NotImplementedError("m3/slot_mapping: append_row")

    def slot_mapping(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Returns the slot of each (row, position) pair, int64; all three arrays are [num_tokens].

        E.g. blocks of 4, row 0 is [7, 2]: positions 3, 4 have the slots 31, 8.
        """
        raise NotImplementedError("m3/slot_mapping: slot_mapping")
