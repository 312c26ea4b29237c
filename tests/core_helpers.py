"""Builders and a driver for tests of the core: a tiny architecture, an engine on the fake executor, requests by length.

Milestone: M1. No torch, no weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folovllm.core.kv_cache_utils import KVCacheBlock, cdiv
from folovllm.core.prefix_index import NullPrefixIndex
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import _ROOT, FakeExecutor, _RequestState, fake_tokens, mix
from folovllm.hf_config import ModelArchitecture, RopeConfig
from folovllm.outputs import EngineCoreOutput, ModelRunnerOutput
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

# A drive that needs more is stuck. With a budget of 1 token, 50 requests of 24 tokens rightly take over 1,000 steps.
MAX_STEPS = 20_000


def tiny_arch(max_position_embeddings: int = 4096) -> ModelArchitecture:
    """One layer, one head of size one: 8 bytes of KV per token in float32."""
    return ModelArchitecture(
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_hidden_layers=1,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1,
        vocab_size=1000,
        max_position_embeddings=max_position_embeddings,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=True,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(0,),
    )


def make_config(max_model_len: int = 16, block_size: int | str = 4, **args: Any) -> EngineConfig:
    """A resolved config from flat arguments of the cache and the scheduler, whether their rungs are built or not."""
    cache_names = CacheConfig.__dataclass_fields__
    cache = {name: args.pop(name) for name in list(args) if name in cache_names}
    config = EngineConfig(
        parts=args.pop("parts", None),
        trace=args.pop("trace", None),
        model_config=ModelConfig(max_model_len=max_model_len),
        cache_config=CacheConfig(block_size=block_size, **cache),
        scheduler_config=SchedulerConfig(**args),
    )
    return config.resolve(tiny_arch(max(max_model_len, 64)), "cpu")


class AttendingExecutor(FakeExecutor):
    """A FakeExecutor that reads the whole context for every sampled token, as attention does.

    The plain one reads only the last slot, so a block in the *middle* of a sequence that somebody else overwrote would
    go unnoticed. This one also holds the scheduler to its own counts.
    """

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        for cached in scheduler_output.scheduled_cached_reqs:
            if not cached.resumed:
                computed = self.requests[cached.request_id].num_computed_tokens
                assert cached.num_computed_tokens == computed, f"{cached.request_id}: computed tokens skipped or redone"
        if scheduler_output.preempted_req_ids:
            resumed = [cached for cached in scheduler_output.scheduled_cached_reqs if cached.resumed]
            assert not scheduler_output.scheduled_new_reqs and not resumed, "admitted in a step that preempted"
        total = sum(scheduler_output.num_scheduled_tokens.values())
        assert scheduler_output.total_num_scheduled_tokens == total
        return super().execute(scheduler_output)

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        for request_id in handle.sampling_req_ids:
            self._attend(request_id, self.requests[request_id])
        return super().sample(handle)

    def _attend(self, request_id: str, state: _RequestState) -> None:
        assert state.num_computed_tokens == len(state.token_ids), f"{request_id} samples in mid-prompt"
        digest = _ROOT
        for position, token_id in enumerate(state.token_ids):
            digest = mix(digest, token_id)
            assert self._read(state, position) == digest, f"{request_id}: slot of position {position} was overwritten"


def make_core(executor: FakeExecutor | None = None, **config_args: Any) -> EngineCore:
    """EngineCore on an AttendingExecutor. E.g. make_core(block_size=4, num_kv_blocks=5, batching="static")."""
    return EngineCore(make_config(**config_args), executor or AttendingExecutor())


class ToyIndex(NullPrefixIndex):
    """All tokens up to the end of a full block -> that block. Slow, obvious, and free of hash collisions."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: dict[tuple[int, ...], KVCacheBlock] = {}

    def match(self, request: Request) -> list[KVCacheBlock]:
        hits: list[KVCacheBlock] = []
        while (end := (len(hits) + 1) * self.block_size) <= request.num_tokens - 1:  # one token is left to compute
            block = self.blocks.get(tuple(request.all_token_ids[:end]))
            if block is None:
                break
            hits.append(block)
        return hits

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        for i, block in enumerate(blocks[:num_full_blocks]):
            prefix = tuple(request.all_token_ids[: (i + 1) * self.block_size])
            if prefix not in self.blocks:
                self.blocks[prefix] = block
                block.block_hash = repr(prefix).encode()

    def remove(self, block: KVCacheBlock) -> None:
        self.blocks = {prefix: other for prefix, other in self.blocks.items() if other is not block}


def use_toy_index(core: EngineCore) -> ToyIndex:
    """Prefix caching before M6: put a toy index in the place of the null object."""
    index = ToyIndex(core.kv_cache_config.block_size)
    core.scheduler.kv_cache_manager.block_pool.prefix_index = index
    return index


def caching_core(**config_args: Any) -> tuple[EngineCore, ToyIndex]:
    core = make_core(**config_args)
    return core, use_toy_index(core)


def make_request(request_id: str, prompt: int | Sequence[int], max_tokens: int = 100, **args: Any) -> Request:
    """A greedy request; `prompt` is the token ids or only how many.

    `args` go to SamplingParams where it knows them, else to Request. EOS is ignored unless eos_token_id is given.
    """
    if isinstance(prompt, int):
        prompt = [(sum(map(ord, request_id)) * 31 + i * 7) % 1000 for i in range(prompt)]
    names = SamplingParams.__dataclass_fields__
    params = {name: args.pop(name) for name in list(args) if name in names}
    params.setdefault("ignore_eos", "eos_token_id" not in args)
    sampling_params = SamplingParams(temperature=0.0, max_tokens=max_tokens, **params)
    return Request(request_id, list(prompt), sampling_params, **args)


def expected_tokens(request: Request, max_model_len: int, vocab_size: int = 1000) -> list[int]:
    """What `request` must generate, from the oracle and the stop rules alone; call it before the request runs."""
    params = request.sampling_params
    room = max_model_len - request.num_prompt_tokens
    tokens = fake_tokens(request.prompt_token_ids, min(request.max_tokens, room), vocab_size)
    stops = set(params.stop_token_ids or ())
    if request.eos_token_id is not None and not params.ignore_eos:
        stops.add(request.eos_token_id)
    for i, token_id in enumerate(tokens):
        if token_id in stops and i + 1 >= params.min_tokens:
            return tokens[: i + 1]
    return tokens


def add_all(core: EngineCore, requests: Iterable[Request]) -> None:
    for request in requests:
        core.add_request(request)


def drive(core: EngineCore, max_steps: int = MAX_STEPS) -> dict[str, list[EngineCoreOutput]]:
    """Step until nothing is left, with the integrity check after every step; all outputs by request."""
    outputs: dict[str, list[EngineCoreOutput]] = {}
    for _ in range(max_steps):
        if not core.has_unfinished_requests():
            return outputs
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        check(core)
    raise AssertionError(f"not done after {max_steps} steps: {core.stats()}")


def tokens_of(outputs: Iterable[EngineCoreOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.new_token_ids]


def schedule_and_run(core: EngineCore) -> SchedulerOutput:
    """One step like EngineCore.step, but answering what was scheduled."""
    scheduler_output = core.scheduler.schedule()
    runner_output = core.executor.sample(core.executor.execute(scheduler_output))
    core.scheduler.update_from_output(scheduler_output, runner_output)
    check(core)
    return scheduler_output


def block_ids(core: EngineCore, request_id: str) -> list[int]:
    return core.scheduler.kv_cache_manager.get_block_ids(request_id)[0]


def free_ids(core: EngineCore) -> list[int]:
    """Ids of the free blocks, next victim first."""
    return [b.block_id for b in core.scheduler.kv_cache_manager.block_pool.free_block_queue.get_all_free_blocks()]


def worker_requests(core: EngineCore) -> list[str]:
    """Requests whose state the worker still keeps."""
    assert isinstance(core.executor, FakeExecutor)
    return list(core.executor.requests)


def ids(requests: Iterable[Request]) -> list[str]:
    return [request.request_id for request in requests]


def check(core: EngineCore) -> None:
    """The core's own integrity check, and that nobody holds more or fewer blocks than his computed tokens need."""
    core.scheduler.check_integrity()
    for request in core.scheduler.running:
        needed = cdiv(request.num_computed_tokens, core.kv_cache_config.block_size)
        assert len(block_ids(core, request.request_id)) == needed, request


def assert_nothing_leaked(core: EngineCore) -> None:
    """Nobody is left, and every block is free again."""
    scheduler = core.scheduler
    scheduler.check_integrity()
    assert not scheduler.requests and not scheduler.running and not len(scheduler.waiting)
    assert not scheduler.kv_cache_manager.req_to_blocks
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_blocks - 1 and pool.usage == 0.0
