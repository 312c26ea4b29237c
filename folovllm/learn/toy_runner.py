"""The toy model runner: what worker/model_runner.py does, with a number in the place of every vector. For case files.

Milestone: M1. vLLM counterpart: vllm/v1/worker/gpu_model_runner.py. Left out: everything that needs a tensor.

`ToyRunner` turns the scheduler's message into a flat batch, writes K/V through a slot mapping and lets every query read
all slots of its sequence through the block table. The position of a token changes its number. Unlike AttendingExecutor,
it notices nothing: if a table, a position or a length is wrong, it gives wrong tokens, as a real model does.

    core = make_engine(parts, block_size=4, num_kv_blocks=9)
    tokens = generate(core, [make_request("r1", prompt=[5, 9, 2], max_tokens=4)])
    assert tokens["r1"] == alone([5, 9, 2], 4)
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import ROOT, FakeExecutor, FakeRequest, mix
from folovllm.learn.toy_engine import make_core, steps_of
from folovllm.outputs import ModelRunnerOutput
from folovllm.parts import load_class
from folovllm.request import Request

RUNNER = "toy.runner"  # stands beside the names of PARTS in the `parts` of a case
NUM_LAYERS = 2
VOCAB_SIZE = 1000
MAX_STEPS = 1000


@dataclass
class FlatBatch:
    """The tokens of a step, request by request. E.g. r1 decodes position 5, r2 begins with 3 tokens; blocks of 4:

    token_ids        [417,  5,  9,  2]
    positions        [  5,  0,  1,  2]
    slot_mapping     [ 29, 12, 13, 14]     r1 holds the blocks [2, 7], r2 holds [3]
    query_start_loc  [  0,  1,  4]         where each request begins
    seq_lens         [  6,  3]             how many slots of each request may be read
    """

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slot_mapping: list[int] = field(default_factory=list)
    query_start_loc: list[int] = field(default_factory=lambda: [0])
    seq_lens: list[int] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)


Handle = tuple[SchedulerOutput, dict[str, int]]  # the message, and the last hidden number of each request


class ToyRunner(FakeExecutor):
    """A model of two layers, so that a wrong hidden number of one token spoils the K/V that later tokens read."""

    def __init__(self) -> None:
        super().__init__(VOCAB_SIZE)
        self.batches: list[FlatBatch] = []  # what was computed, step by step

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self.block_size = kv_cache_config.block_size
        # A slot that was never written holds 0, and one that was freed holds what it held.
        self.kv_cache = [[0] * (kv_cache_config.num_blocks * self.block_size) for _ in range(NUM_LAYERS)]

    def execute(self, scheduler_output: SchedulerOutput) -> Handle:  # type: ignore[override]
        self._update_states(scheduler_output)
        for source, destination in scheduler_output.block_copies:
            self._copy_block(source, destination)
        self.batches.append(self.prepare(scheduler_output))
        hidden = self.forward(self.batches[-1])
        return scheduler_output, dict(zip(scheduler_output.num_scheduled_tokens, hidden, strict=True))

    def prepare(self, scheduler_output: SchedulerOutput) -> FlatBatch:
        batch = FlatBatch()
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            state = self.requests[request_id]
            start = state.num_computed_tokens
            batch.token_ids += [state.token_ids[i] for i in range(start, start + num_tokens)]
            batch.slot_mapping += [self._slot(state.block_ids, i) for i in range(start, start + num_tokens)]
            batch.positions += self.positions(state, num_tokens)
            batch.seq_lens.append(self.seq_len(state, num_tokens))
            batch.query_start_loc.append(len(batch.token_ids))
            batch.block_tables.append(state.block_ids)
        return batch

    def positions(self, state: FakeRequest, num_tokens: int) -> list[int]:
        """Returns the positions of the `num_tokens` tokens that this step computes. The first token has position 0."""
        start = state.num_computed_tokens
        return list(range(start, start + num_tokens))

    def seq_len(self, state: FakeRequest, num_tokens: int) -> int:
        """Returns how many slots hold K/V once this step has written its own `num_tokens`."""
        return state.num_computed_tokens + num_tokens

    def forward(self, batch: FlatBatch) -> list[int]:
        """Returns the hidden number of the last token of each request."""
        hidden = [mix(position, token) for position, token in zip(batch.positions, batch.token_ids, strict=True)]
        for layer in self.kv_cache:
            for slot, value in zip(batch.slot_mapping, hidden, strict=True):
                layer[slot] = value
            hidden = self._attention(batch, layer)
        return [hidden[end - 1] for end in batch.query_start_loc[1:]]

    def _attention(self, batch: FlatBatch, layer: list[int]) -> list[int]:
        """Causal attention. The last query of a request sees all of its `seq_len` slots, the one before it one less."""
        out: list[int] = []
        for row, (start, end) in enumerate(zip(batch.query_start_loc, batch.query_start_loc[1:], strict=False)):
            first_key = batch.seq_lens[row] - (end - start)  # the newest key that the first query sees
            digest = ROOT
            out += [ROOT] * -first_key  # queries that see nothing; there are none if the lengths are right
            for key in range(batch.seq_lens[row]):
                digest = mix(digest, layer[self._slot(batch.block_tables[row], key)])
                if key >= first_key:
                    out.append(digest)
        return out

    def sample(self, handle: Handle) -> ModelRunnerOutput:  # type: ignore[override]
        output, hidden = handle
        sampled: dict[str, list[int]] = {request_id: [] for request_id in output.num_scheduled_tokens}
        for request_id in sampled:
            if request_id in output.sampling_req_ids:
                sampled[request_id] = [self.choose_token(request_id, hidden[request_id])]
        return ModelRunnerOutput(sampled_token_ids=sampled)

    def choose_token(self, request_id: str, hidden: int) -> int:
        """Greedy. The token is also kept: the next step computes its K/V."""
        token_id = hidden % self.vocab_size
        self.requests[request_id].token_ids.append(token_id)
        return token_id

    def _slot(self, block_ids: list[int], position: int) -> int:  # type: ignore[override]
        """Behind its end a block table is padded with block 0, as in a real one."""
        index = position // self.block_size
        return (block_ids[index] if index < len(block_ids) else 0) * self.block_size + position % self.block_size

    def _copy_block(self, source: int, destination: int) -> None:
        size = self.block_size
        for layer in self.kv_cache:
            layer[destination * size : (destination + 1) * size] = layer[source * size : (source + 1) * size]


class TwoRankRunner(ToyRunner):
    """Tensor parallelism: two ranks, each a process with half of the heads, its own K/V and its own list of tokens.

    What the two compute is added up, so both have the same logits. Then each samples for itself, with random numbers of
    its own, and the scheduler is told what rank 0 has sampled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ranks = (ToyRunner(), ToyRunner())
        self.random = [self.make_random(rank) for rank in range(2)]
        self.temperature: dict[str, float] = {}

    def make_random(self, rank: int) -> random.Random:
        """Returns the source of random numbers of a rank."""
        return random.Random(0)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        for runner in self.ranks:
            runner.initialize_kv_cache(kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> Handle:  # type: ignore[override]
        for new in scheduler_output.scheduled_new_reqs:
            self.temperature[new.request_id] = new.sampling_params.temperature
        (_, first), (_, second) = (runner.execute(scheduler_output) for runner in self.ranks)
        return scheduler_output, {request_id: mix(first[request_id], second[request_id]) for request_id in first}

    def choose_token(self, request_id: str, hidden: int) -> int:
        token_ids = [self.choose(rank, request_id, hidden) for rank in range(2)]
        for runner, token_id in zip(self.ranks, token_ids, strict=True):
            runner.requests[request_id].token_ids.append(token_id)
        return token_ids[0]

    def choose(self, rank: int, request_id: str, hidden: int) -> int:
        """Returns the token that `rank` samples. A temperature of 0 asks for no random number."""
        noise = self.random[rank].randrange(self.vocab_size) if self.temperature[request_id] > 0 else 0
        return (hidden + noise) % self.vocab_size


# ---- running it


def make_engine(parts: Mapping[str, str], **config_args: Any) -> EngineCore:
    """Returns an engine on the toy runner, with `parts` in it. `config_args` are those of make_core."""
    runner = load_class(parts[RUNNER]) if RUNNER in parts else ToyRunner
    of_engine = {name: place for name, place in parts.items() if name != RUNNER}
    return make_core(runner(), parts=of_engine, **config_args)


def generate(core: EngineCore, requests: Sequence[Request], at: Sequence[int] = ()) -> dict[str, list[int]]:
    """Runs the engine until it is idle. Returns the tokens of each request. Request i arrives before step `at[i]`."""
    arrivals = zip([*at, *[0] * (len(requests) - len(at))], requests, strict=True)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for _ in steps_of(core, arrivals, MAX_STEPS):
        for output in core.step():
            tokens[output.request_id] += output.new_token_ids
    assert not core.has_unfinished_requests(), f"requests are left after {MAX_STEPS} steps: {core.stats()}"
    return tokens


def alone(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Returns what ToyRunner generates greedily after a prompt, computed without a KV cache."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        hidden = [mix(position, token) for position, token in enumerate(token_ids)]
        for _ in range(NUM_LAYERS):
            digest, seen = ROOT, []
            for value in hidden:
                digest = mix(digest, value)
                seen.append(digest)
            hidden = seen
        token_ids.append(hidden[-1] % VOCAB_SIZE)
    return token_ids[len(prompt) :]
