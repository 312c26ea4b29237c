"""SchedulerOutput: the one message that travels down from the scheduler to the worker in a step.

Milestone: M1. vLLM counterpart: vllm/v1/core/sched/output.py.
Left out: encoder inputs, KV connectors; grammar masks travel with `Executor.sample`.

Row 1: plain data, no torch. Nothing else crosses from the core to the worker: a new request arrives whole, a known one
as a diff.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from folovllm.sampling_params import SamplingParams


@dataclass(frozen=True)
class NewRequestData:
    """A request the worker does not know, or knows wrongly: everything it needs to make a copy of the state.

    `output_token_ids` is empty but for a request that had generated tokens before a step failed: the worker's copy may
    have been changed half-way, so the request is sent whole again and replaces what the worker has under that id.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    eos_token_id: int | None
    seed: int
    bad_words_token_ids: list[list[int]]
    block_ids: tuple[list[int], ...]  # one list per KV group; all blocks the request holds
    num_computed_tokens: int
    output_token_ids: list[int] = field(default_factory=list)
    extra_eos_token_ids: tuple[int, ...] = ()
    position_offset: int = 0


@dataclass(frozen=True)
class CachedRequestData:
    """A request the worker knows: only what changed.

    For a resumed request (`resumed`) `new_block_ids` replaces the worker's table; otherwise it is appended.

    `new_token_ids` is filled only in a pipeline. Its stages before the last do not sample, so the message tells them
    the output tokens that this step computes. E.g. for a request with a prompt of 5 tokens and the outputs 8 and 9, a
    step that computes position 6 has (9,), and one that computes everything again after a preemption has (8, 9).
    """

    request_id: str
    new_block_ids: tuple[list[int], ...]
    num_computed_tokens: int
    resumed: bool = False
    new_token_ids: Sequence[int] = ()

    def unknown_tokens(self, num_known_tokens: int, num_scheduled_tokens: int) -> Sequence[int]:
        """Those of `new_token_ids` that a worker which knows `num_known_tokens` tokens lacks for this step.

        A token is first sent by the step that computes it, so no step lacks a token that is not in its own message: a
        prefix hit never covers the last token, and the tokens before it were computed, and therefore sent, earlier.
        """
        num_unknown = max(self.num_computed_tokens + num_scheduled_tokens - num_known_tokens, 0)
        assert num_unknown <= len(self.new_token_ids), f"{self.request_id}: the message lacks tokens of this step"
        return self.new_token_ids[len(self.new_token_ids) - num_unknown :]


@dataclass(frozen=True)
class SchedulerOutput:
    """What to compute in one step.

    E.g. two decodes and a prompt of 7 tokens give `num_scheduled_tokens == {"a": 1, "b": 1, "c": 7}`. A step may be
    empty (total 0) and still has to run, to deliver `finished_req_ids`.
    """

    scheduled_new_reqs: list[NewRequestData]
    scheduled_cached_reqs: list[CachedRequestData]
    num_scheduled_tokens: dict[str, int]  # in scheduling order, which is the order of the flat batch
    total_num_scheduled_tokens: int
    sampling_req_ids: frozenset[str]  # requests whose known tokens are all computed after this step: they sample
    finished_req_ids: frozenset[str]  # finished since the previous step: the worker drops their state
    preempted_req_ids: frozenset[str] = frozenset()
    block_copies: list[tuple[int, int]] = field(default_factory=list)  # (source, destination), before any KV write

    @property
    def is_empty(self) -> bool:
        return self.total_num_scheduled_tokens == 0
