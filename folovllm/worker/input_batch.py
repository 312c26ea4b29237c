"""InputBatch: the state of the requests in the batch, kept from step to step.

Milestone: M1. vLLM counterpart: vllm/v1/worker/gpu_input_batch.py.

Rows are added, moved and dropped in place. A step only touches what changed, so its cost does not grow with the length
of the prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from folovllm.core.sched.output import NewRequestData
from folovllm.parts import load_part
from folovllm.sample.metadata import SamplingRow
from folovllm.utils import cdiv
from folovllm.worker.block_table import BlockTable


@dataclass
class CachedRequestState:
    """All that the worker knows of a request until it has finished, also while it is preempted."""

    data: NewRequestData
    block_ids: list[int]
    num_computed_tokens: int
    output_token_ids: list[int] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.data.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output_token_ids)

    @cached_property
    def sampling_row(self) -> SamplingRow:
        """What the sampler needs of this request: references, nothing is copied, so it stays right as tokens come."""
        return SamplingRow(
            params=self.data.sampling_params,
            prompt_token_ids=self.data.prompt_token_ids,
            output_token_ids=self.output_token_ids,
            eos_token_id=self.data.eos_token_id,
            seed=self.data.seed,
            bad_words_token_ids=self.data.bad_words_token_ids,
            extra_eos_token_ids=self.data.extra_eos_token_ids,
        )


class InputBatch:
    """Rows 0 .. num_reqs - 1 are the requests in the batch; there are no holes."""

    def __init__(
        self, max_num_reqs: int, max_model_len: int, block_size: int, parts: Mapping[str, str] | None = None
    ) -> None:
        max_num_blocks_per_req = cdiv(max_model_len, block_size)
        self.req_ids: list[str] = []
        self.row_of: dict[str, int] = {}
        self._is_changing = False
        # The operating system provides a zeroed page when it is first written: a large table costs nothing unused.
        self.token_ids = np.zeros((max_num_reqs, max_model_len), dtype=np.int32)
        self.num_tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self.num_computed_tokens = np.zeros(max_num_reqs, dtype=np.int64)
        self.position_offset = np.zeros(max_num_reqs, dtype=np.int64)  # see Request
        make_block_table = load_part("worker.block_table", parts)
        self.block_table: BlockTable = make_block_table(max_num_reqs, max_num_blocks_per_req, block_size)

    @property
    def num_reqs(self) -> int:
        return len(self.req_ids)

    def begin_changes(self) -> None:
        """A step begins to add and remove rows. If an exception ended the last one while it did, no row is trusted.

        The requests that continue are then added again from their states, as after a preemption.
        """
        if self._is_changing:
            self.req_ids, self.row_of = [], {}
        self._is_changing = True

    def end_changes(self) -> None:
        self._is_changing = False

    def add_request(self, request: CachedRequestState) -> None:
        """Appends a row for `request`."""
        row = self.num_reqs
        self.req_ids.append(request.data.request_id)
        self.row_of[request.data.request_id] = row
        tokens = request.data.prompt_token_ids + request.output_token_ids
        self.token_ids[row, : len(tokens)] = tokens
        self.num_tokens[row] = len(tokens)
        self.num_computed_tokens[row] = request.num_computed_tokens
        self.position_offset[row] = request.data.position_offset
        self.block_table.add_row(request.block_ids, row)

    def remove_request(self, request_id: str) -> None:
        """Drops a row and moves the last one into the hole. Does nothing if `request_id` has no row."""
        row = self.row_of.pop(request_id, None)
        if row is None:
            return
        last = self.num_reqs - 1
        if row != last:
            self._move_row(last, row)
        self.req_ids.pop()

    def append_token(self, request_id: str, token_id: int) -> None:
        row = self.row_of[request_id]
        self.token_ids[row, self.num_tokens[row]] = token_id
        self.num_tokens[row] += 1

    def _move_row(self, source: int, destination: int) -> None:
        request_id = self.req_ids[source]
        length = self.num_tokens[source]
        self.req_ids[destination] = request_id
        self.row_of[request_id] = destination
        self.token_ids[destination, :length] = self.token_ids[source, :length]
        self.num_tokens[destination] = length
        self.num_computed_tokens[destination] = self.num_computed_tokens[source]
        self.position_offset[destination] = self.position_offset[source]
        self.block_table.move_row(source, destination)
