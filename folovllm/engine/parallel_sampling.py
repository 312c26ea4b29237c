"""ParentRequest: one request with n > 1 becomes n requests with n = 1, and their outputs one again.

Milestone: M1. vLLM counterpart: vllm/v1/engine/parallel_sampling.py.
Left out: nothing. The engine core never sees n: children share the prompt's blocks through the prefix cache (M6).
"""

from typing import Any

from folovllm.outputs import CompletionOutput, LogprobsOnePosition, RequestMetrics
from folovllm.request import Request
from folovllm.sampling_params import RequestOutputKind


class ParentRequest:
    """The front end's record of a request with n > 1.

    E.g. request "a" with n=2 and seed 7 -> children "0_a" (seed 7) and "1_a" (seed 8).
    """

    def __init__(self, request: Request) -> None:
        assert request.sampling_params.n > 1
        self.request = request
        self.request_id = request.request_id
        self.unfinished: set[str] = set()  # child ids
        self.completions: list[CompletionOutput] = []  # finished ones, kept for FINAL_ONLY
        self.metrics: list[RequestMetrics] = []
        self.prompt_logprobs: list[LogprobsOnePosition | None] | None = None
        self.num_cached_tokens: int | None = None  # of child 0: what was cached before this request came

    def mark(self) -> tuple[dict[str, Any], set[str], int, int]:
        """What `rewind` needs to come back to this moment."""
        return vars(self).copy(), set(self.unfinished), len(self.completions), len(self.metrics)

    def rewind(self, mark: tuple[dict[str, Any], set[str], int, int]) -> None:
        attributes, unfinished, num_completions, num_metrics = mark
        vars(self).update(attributes)
        self.unfinished = set(unfinished)
        del self.completions[num_completions:], self.metrics[num_metrics:]

    @property
    def has_finished_child(self) -> bool:
        return len(self.unfinished) < self.request.sampling_params.n

    @property
    def final_only(self) -> bool:
        return self.request.sampling_params.output_kind is RequestOutputKind.FINAL_ONLY

    def children(self) -> list[Request]:
        """The n requests to give to the engine core."""
        children = [self._child(index) for index in range(self.request.sampling_params.n)]
        self.unfinished = {child.request_id for child in children}
        return children

    def collect(self, child_id: str, completion: CompletionOutput) -> list[CompletionOutput]:
        """Returns what to report after `completion` of `child_id`: it alone, or with FINAL_ONLY all at the end."""
        if completion.finished():
            self.unfinished.discard(child_id)
        if not self.final_only:
            return [completion]
        self.completions.append(completion)
        return [] if self.unfinished else sorted(self.completions, key=lambda c: c.index)

    def observe(
        self,
        index: int,
        metrics: RequestMetrics,
        num_cached_tokens: int | None,
        prompt_logprobs: list[LogprobsOnePosition | None] | None,
    ) -> None:
        """Keeps what the outputs of the whole request will report of this output of child `index`."""
        if self.final_only:
            self.metrics.append(metrics)
        if index == 0:
            self.num_cached_tokens, self.prompt_logprobs = num_cached_tokens, prompt_logprobs

    def _child(self, index: int) -> Request:
        parent, params = self.request, self.request.sampling_params
        changes = {"n": 1, "seed": None if params.seed is None else _wrap_int64(params.seed + index)}
        if index > 0:
            # All children have the same prompt, and a request that wants its logprobs cannot use cached blocks.
            changes["prompt_logprobs"] = None
        return type(parent)(
            f"{index}_{parent.request_id}",
            parent.prompt_token_ids,
            params.replace(**changes),
            eos_token_id=parent.eos_token_id,
            arrival_time=parent.arrival_time,
            priority=parent.priority,
            cache_salt=parent.cache_salt,
            seed=_wrap_int64(parent.seed + index),
            bad_words_token_ids=parent.bad_words_token_ids,
            extra_eos_token_ids=parent.extra_eos_token_ids,
            position_offset=parent.position_offset,
        )


def merge_metrics(children: list[RequestMetrics]) -> RequestMetrics:
    """The timing of the whole request: the first events are the earliest child's, the durations the longest child's."""

    def known(name: str) -> list[float]:
        return [getattr(child, name) for child in children if getattr(child, name) is not None]

    first = {name: min(known(name), default=None) for name in ("queue_time", "time_to_first_token")}
    longest = ("prefill_time", "decode_time", "inference_time", "time_per_output_token", "e2e_latency")
    return RequestMetrics(
        arrival_time=children[0].arrival_time,
        num_generation_tokens=sum(child.num_generation_tokens for child in children),
        replica=children[-1].replica,
        inter_token_latencies=[latency for child in children for latency in child.inter_token_latencies],
        **first,
        **{name: max(known(name), default=None) for name in longest},
    )


def _wrap_int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
