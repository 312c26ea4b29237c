"""InputBuffers: where the tensors lie that every step fills and reads, at addresses that stay.

Milestone: M4. vLLM counterpart: the persistent buffers of `GPUModelRunner` in vllm/v1/worker/gpu_model_runner.py, and
the device side of vllm/v1/worker/block_table.py. Left out: CUDA graphs, which will replay on these addresses.

    tokens    [3, max_num_tokens]           input_ids, positions and slot_mapping: one copy to a GPU fills all three
    tables    [max_num_reqs, max_blocks]    a copy fills the columns in use; what lies behind them is never read

On a CPU nothing is copied: numpy writes the numbers to where torch reads them, and the table is the batch's own.
"""

import numpy as np
import torch

from folovllm import transfers
from folovllm.utils import cdiv, round_up
from folovllm.worker.block_table import BlockTable

_ROW_MULTIPLE = 2  # so that each row of int64 begins at a multiple of 16 bytes (see transfers.to_device_packed)


class InputBuffers:
    """The buffers of one runner. What they hold is valid until the next step fills them."""

    def __init__(self, max_num_tokens: int, batch_table: BlockTable, device: torch.device) -> None:
        self._is_cpu = device.type == "cpu"
        self._tokens = torch.zeros(3, round_up(max_num_tokens, _ROW_MULTIPLE), dtype=torch.int64, device=device)
        self.input_ids, self.positions, self.slot_mapping = self._tokens  # each [max_num_tokens] int64
        self._host_tokens = self._tokens.numpy() if self._is_cpu else np.empty(0)  # the same memory
        shape = (0, 0) if self._is_cpu else batch_table.table.shape
        self._tables = torch.zeros(shape, dtype=torch.int32, device=device)

    def fill(self, input_ids: np.ndarray, positions: np.ndarray, slot_mapping: np.ndarray) -> None:
        """Takes the tokens of a step; all three are [num_tokens]."""
        if not self._is_cpu:
            transfers.copy_to(self._tokens, np.stack([input_ids, positions, slot_mapping]))
            return
        for row, values in zip(self._host_tokens, (input_ids, positions, slot_mapping), strict=True):
            row[: len(values)] = values

    def block_table(self, batch_table: BlockTable, seq_lens: list[int]) -> torch.Tensor:
        """Returns the rows of the requests, which have `seq_lens` [num_reqs] tokens: [num_reqs, max_blocks] int32."""
        num_reqs = len(seq_lens)
        if self._is_cpu:
            return torch.from_numpy(batch_table.table[:num_reqs])
        num_columns = cdiv(max(seq_lens), batch_table.block_size)
        transfers.copy_to(self._tables, batch_table.table[:num_reqs, :num_columns])
        return self._tables[:num_reqs]
