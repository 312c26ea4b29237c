"""PipelineStage: what one stage of a pipeline does around its layers, which is to receive and to send.

Milestone: M9. vLLM counterpart: `Worker.execute_model` in vllm/v1/worker/gpu_worker.py. Left out: sending the shards
of a tensor and gathering them on the other side, virtual stages.

    first stage:   token ids -> embedding, layers -> send
    middle stage:  receive   -> layers            -> send
    last stage:    receive   -> layers, norm      -> hidden states of the rows that are read

All rows travel, because the next layers attend to all of them. Each part of a stage sends to the same part of the next
one: after the last all-reduce all parts of a stage have the same tensors.
"""

import torch

from folovllm.distributed.communicator import ParallelGroups
from folovllm.model_executor.models.interface import CausalLM, IntermediateTensors


class PipelineStage:
    """The stage of one rank. `hidden_size` and `dtype` are those of the tensors between the stages."""

    def __init__(self, groups: ParallelGroups, hidden_size: int, dtype: torch.dtype) -> None:
        self._shard, self._pp = groups.shard, groups.pp
        self._hidden_size, self._dtype = hidden_size, dtype
        self._skipped: list[int] = []  # how many tokens the steps had that `skip` was called for

    def run(self, model: CausalLM, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Both [num_tokens] -> hidden states [num_selected, hidden_size] in the last stage, and [0] in the others."""
        intermediate = None if self._shard.is_first_stage else self._receive(len(input_ids))
        result = model(input_ids, positions, intermediate)
        if not isinstance(result, IntermediateTensors):
            return result
        for tensor in result:
            self._pp.send(tensor, self._pp.rank + 1)
        return torch.empty(0)

    def skip(self, num_tokens: int) -> None:
        """Does not compute a step, because an earlier one has raised in this rank.

        The stage before may have sent its tensors, or may have raised and skip the step, too. So nothing is received
        until `catch_up` says which.
        """
        if self._shard.is_last_stage:
            self._skipped.append(num_tokens)

    def catch_up(self, num_sent: int) -> None:
        """Takes what is on its way of the skipped steps: the stage before has made `num_sent` sends since the start."""
        for num_tokens in self._skipped:
            if self._pp.counts.calls.get("receive", 0) < num_sent:
                self._receive(num_tokens)
        self._skipped.clear()

    def _receive(self, num_tokens: int) -> IntermediateTensors:
        shape = (num_tokens, self._hidden_size)
        hidden, residual = (
            self._pp.receive(shape, self._dtype, self._pp.rank - 1) for _ in IntermediateTensors._fields
        )
        return IntermediateTensors(hidden, residual)
