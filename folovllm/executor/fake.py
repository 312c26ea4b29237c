"""FakeExecutor: a deterministic "model" without weights and without torch, strict about the KV cache.

Milestone: M1. vLLM counterpart: none. Its "K/V" of a token is a digest of the token and of the digest in the slot of
the token before it, *as read through the block table*; the next token is a function of the last digest. So a wrong
block table, a stale block, a missing write or a prefix hit with the wrong parent gives a wrong token, and scheduling
and paging can be proven right in milliseconds.

Row 1: no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import NewRequestData, SchedulerOutput
from folovllm.executor.base import Executor
from folovllm.outputs import ModelRunnerOutput

_MASK = 2**64 - 1
ROOT = 0x9E3779B97F4A7C15


def mix(previous: int, token_id: int) -> int:
    """Digest of a token after the digest `previous` (the splitmix64 finaliser)."""
    x = (previous ^ ((token_id + 1) * 0xBF58476D1CE4E5B9)) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def fake_tokens(prompt_token_ids: Sequence[int], num_tokens: int, vocab_size: int = 1000) -> list[int]:
    """The oracle: what the fake model generates after a prompt, computed without any cache."""
    digest = ROOT
    for token_id in prompt_token_ids:
        digest = mix(digest, token_id)
    tokens = []
    for _ in range(num_tokens):
        tokens.append(digest % vocab_size)
        digest = mix(digest, tokens[-1])
    return tokens


@dataclass
class FakeRequest:
    """The worker's own copy of a request."""

    token_ids: list[int]
    block_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0


class FakeExecutor(Executor):
    """Implements Executor on a list of digests instead of tensors."""

    def __init__(self, vocab_size: int = 1000, available_bytes: int = 2**40) -> None:
        self.vocab_size = vocab_size
        self.available_bytes = available_bytes
        self.requests: dict[str, FakeRequest] = {}
        self.slots: list[int | None] = []
        self.block_size = 0

    def available_kv_cache_bytes(self) -> int:
        return self.available_bytes

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self.block_size = kv_cache_config.block_size
        self.slots = [None] * (kv_cache_config.num_blocks * self.block_size)

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        self._update_states(scheduler_output)
        for source, destination in scheduler_output.block_copies:
            self._copy_block(source, destination)
        # Requests in scheduled order: a later one may read what an earlier one writes in this step (a prefix hit).
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            self._write(self.requests[request_id], num_tokens)
        return scheduler_output

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        sampled: dict[str, list[int]] = {request_id: [] for request_id in handle.num_scheduled_tokens}
        for request_id in handle.num_scheduled_tokens:
            if request_id in handle.sampling_req_ids:
                state = self.requests[request_id]
                token_id = self._read(state, len(state.token_ids) - 1) % self.vocab_size
                state.token_ids.append(token_id)
                sampled[request_id] = [token_id]
        return ModelRunnerOutput(sampled_token_ids=sampled)

    def _update_states(self, output: SchedulerOutput) -> None:
        for request_id in output.finished_req_ids:
            self.requests.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            self.requests[new.request_id] = self._new_state(new)
        for cached in output.scheduled_cached_reqs:
            state = self.requests[cached.request_id]
            (new_block_ids,) = cached.new_block_ids
            state.block_ids = list(new_block_ids) if cached.resumed else state.block_ids + new_block_ids
            state.num_computed_tokens = cached.num_computed_tokens
            if cached.new_token_ids:
                num_scheduled = output.num_scheduled_tokens[cached.request_id]
                state.token_ids += cached.unknown_tokens(len(state.token_ids), num_scheduled)

    @staticmethod
    def _new_state(new: NewRequestData) -> FakeRequest:
        token_ids = new.prompt_token_ids + new.output_token_ids
        return FakeRequest(token_ids, list(new.block_ids[0]), new.num_computed_tokens)

    def _write(self, state: FakeRequest, num_tokens: int) -> None:
        start = state.num_computed_tokens
        assert num_tokens > 0 and start + num_tokens <= len(state.token_ids), "more tokens scheduled than are known"
        for position in range(start, start + num_tokens):
            previous = self._read(state, position - 1) if position > 0 else ROOT
            self.slots[self._slot(state, position)] = mix(previous, state.token_ids[position])
        state.num_computed_tokens = start + num_tokens

    def _read(self, state: FakeRequest, position: int) -> int:
        digest = self.slots[self._slot(state, position)]
        assert digest is not None, f"read of position {position}, whose slot was never written"
        return digest

    def _slot(self, state: FakeRequest, position: int) -> int:
        block_id = state.block_ids[position // self.block_size]
        assert block_id != 0, "the null block holds nobody's tokens"
        return block_id * self.block_size + position % self.block_size

    def _copy_block(self, source: int, destination: int) -> None:
        size = self.block_size
        self.slots[destination * size : (destination + 1) * size] = self.slots[source * size : (source + 1) * size]
