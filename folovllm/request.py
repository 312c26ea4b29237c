"""Request: one prompt on its way through the engine, and the states it passes.

Milestone: M0 (states grow use in M2). vLLM counterpart: vllm/v1/request.py.
Left out: pooling, multimodal inputs, structured output, LoRA.

Row 0: plain data, no torch.

    WAITING ──schedule──> RUNNING ──stop──> FINISHED_*
       ^                     │ no blocks left
       └──── schedule ── PREEMPTED
"""

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass

from folovllm.sampling_params import SamplingParams


class RequestStatus(enum.IntEnum):
    """The states of a request, in vLLM's order: every state after PREEMPTED is finished."""

    WAITING = 1
    RUNNING = 2
    PREEMPTED = 3
    FINISHED_STOPPED = 4
    FINISHED_LENGTH_CAPPED = 5
    FINISHED_ABORTED = 6
    FINISHED_ERROR = 7

    @staticmethod
    def is_finished(status: "RequestStatus") -> bool:
        return status > RequestStatus.PREEMPTED

    @staticmethod
    def get_finished_reason(status: "RequestStatus") -> str | None:
        return _FINISHED_REASON.get(status)


_FINISHED_REASON = {
    RequestStatus.FINISHED_STOPPED: "stop",
    RequestStatus.FINISHED_LENGTH_CAPPED: "length",
    RequestStatus.FINISHED_ABORTED: "abort",
    RequestStatus.FINISHED_ERROR: "error",
}

# The legal moves. RUNNING -> RUNNING never happens, and a finished request never moves again. The one
# way around it is `Request.rewind`, after an exception.
_TRANSITIONS: dict[RequestStatus, frozenset[RequestStatus]] = {
    RequestStatus.WAITING: frozenset({RequestStatus.RUNNING}),
    RequestStatus.RUNNING: frozenset({RequestStatus.PREEMPTED}),
    RequestStatus.PREEMPTED: frozenset({RequestStatus.RUNNING}),
}


@dataclass(frozen=True)
class TokenLogprobs:
    """Logprobs of one position as the sampler returns them: first the token itself, then the top k by rank."""

    token_ids: list[int]  # [1 + k]
    logprobs: list[float]  # [1 + k]
    rank: int  # of the first entry


@dataclass
class RequestTimes:
    """When the steps of a request's life happened, in seconds of `time.monotonic()` (R1.36). 0.0 means not yet."""

    arrival: float = 0.0
    queued: float = 0.0
    scheduled: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


class Request:
    """The state of one request inside the engine core.

    `num_computed_tokens` counts the tokens whose K/V are in the cache *or scheduled to be*: the scheduler advances it
    right after scheduling. To schedule a request means to let that number catch up with `num_tokens`; there are no
    phases.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        eos_token_id: int | None = None,
        arrival_time: float | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        seed: int = 0,
        bad_words_token_ids: list[list[int]] | None = None,
        extra_eos_token_ids: tuple[int, ...] = (),
        position_offset: int = 0,
    ) -> None:
        assert prompt_token_ids, "the input processor refuses empty prompts"
        assert sampling_params.max_tokens is not None, "the input processor resolves max_tokens"
        self.request_id = request_id
        self.sampling_params = sampling_params
        self.eos_token_id = eos_token_id
        # Other ids that end a text. They stop a request as stop_token_ids unless ignore_eos; min_tokens forbids them.
        self.extra_eos_token_ids = extra_eos_token_ids
        # Added to a token's position where the model looks up its angle: selects the frequencies for long requests
        # under dynamic rope scaling, and is 0 under every other.
        self.position_offset = position_offset
        self.priority = priority
        self.cache_salt = cache_salt
        self.seed = seed  # of the sampling noise; without one from the user, the input processor draws it
        self.bad_words_token_ids = bad_words_token_ids or []
        self.max_tokens: int = sampling_params.max_tokens
        self.status = RequestStatus.WAITING
        self.stop_reason: int | str | None = None

        self.prompt_token_ids = prompt_token_ids
        self.num_prompt_tokens = len(prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.all_token_ids = list(prompt_token_ids)
        # Names of the full blocks, for the prefix index. Empty until a hasher is attached.
        self.block_tokens: list[bytes] = []  # packed, 4 bytes per token
        self.block_hashes: list[bytes] = []
        self._hash_new_blocks: Callable[[Request], None] | None = None

        self.num_computed_tokens = 0
        self.num_cached_tokens = -1  # prefix hit at first admission; -1 until then
        self.num_preemptions = 0
        self.prompt_logprobs: list[TokenLogprobs] = []  # grows with the computed prompt; delivered with the first token
        now = time.monotonic()
        self.arrival_time = now if arrival_time is None else arrival_time
        self.times = RequestTimes(arrival=self.arrival_time, queued=now)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def is_finished(self) -> bool:
        return RequestStatus.is_finished(self.status)

    @property
    def skip_reading_prefix_cache(self) -> bool:
        """A request for the logprobs of its prompt must compute the whole prompt, cached or not. What it computes is
        cached.
        """
        return self.sampling_params.prompt_logprobs is not None

    def attach_block_hasher(self, hash_new_blocks: "Callable[[Request], None]") -> None:
        """Names the present full blocks with `hash_new_blocks`, and from now on each block as it fills."""
        self._hash_new_blocks = hash_new_blocks
        hash_new_blocks(self)

    def append_output_token_id(self, token_id: int) -> None:
        self.output_token_ids.append(token_id)
        self.all_token_ids.append(token_id)
        if self._hash_new_blocks is not None:
            self._hash_new_blocks(self)

    def rewind(self, num_output_tokens: int) -> None:
        """Puts the request back into WAITING with its first `num_output_tokens` outputs and nothing computed.

        Called after an exception, so it assumes nothing about the fields that a step changes: it sets all of them. The
        block hasher must be attached again.
        """
        del self.output_token_ids[num_output_tokens:]
        self.all_token_ids[:] = self.prompt_token_ids + self.output_token_ids
        self.status, self.stop_reason = RequestStatus.WAITING, None
        self.num_computed_tokens = 0
        self.prompt_logprobs = []
        self.block_tokens, self.block_hashes = [], []
        self._hash_new_blocks = None

    def set_status(self, status: RequestStatus) -> None:
        """Moves the request to `status`. Asserts that the move is legal."""
        legal = RequestStatus.is_finished(status) or status in _TRANSITIONS.get(self.status, frozenset())
        assert legal and not self.is_finished, f"{self.request_id}: {self.status.name} -> {status.name}"
        self.status = status

    def sort_key(self) -> tuple[int, float, str]:
        """The order in the priority queue: lower priority value first, then earlier arrival, then id."""
        return (self.priority, self.arrival_time, self.request_id)

    def __lt__(self, other: "Request") -> bool:
        return self.sort_key() < other.sort_key()

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.name}, computed {self.num_computed_tokens}/{self.num_tokens}, "
            f"{self.num_output_tokens} out)"
        )


def check_stop(request: Request, max_model_len: int) -> bool:
    """Decides after each appended token whether `request` is finished, and sets its status and stop_reason if so.

    The order of the checks is fixed (R1.4). A full context always stops, even below min_tokens, because the request
    could not get another token. Otherwise min_tokens prevents every stop. Then come EOS, stop ids and max_tokens.
    """
    params = request.sampling_params
    if request.num_tokens >= max_model_len:
        request.set_status(RequestStatus.FINISHED_LENGTH_CAPPED)
        return True
    if request.num_output_tokens < params.min_tokens:
        return False
    last = request.output_token_ids[-1]
    if last == request.eos_token_id and not params.ignore_eos:
        request.set_status(RequestStatus.FINISHED_STOPPED)
        return True
    if last in (params.stop_token_ids or ()):
        request.set_status(RequestStatus.FINISHED_STOPPED)
        request.stop_reason = last
        return True
    if request.num_output_tokens >= request.max_tokens:
        request.set_status(RequestStatus.FINISHED_LENGTH_CAPPED)
        return True
    return False
