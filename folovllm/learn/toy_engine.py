"""The toy engine: the real scheduler and KV cache on a fake model, without torch, and builders to set it up.

Milestone: M1. vLLM counterpart: tests/v1/core/utils.py (`create_scheduler`, `create_requests`).

Exercises, case files and the tests of the core build their engines here. A step takes well under a millisecond, so a
check can run hundreds of workloads. `AttendingExecutor` is strict: a wrong block table, a stale block or a token that
was computed twice raises an error or changes the tokens.

    core = make_core(block_size=4, num_kv_blocks=9, parts=mine.parts)
    add_all(core, [make_request("r1", prompt=5, max_tokens=3)])
    outputs = drive(core)
"""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folovllm import milestones
from folovllm.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.engine.core import EngineCore
from folovllm.executor.base import Executor
from folovllm.executor.fake import ROOT, FakeExecutor, FakeRequest, fake_tokens, mix
from folovllm.hf_config import ModelArchitecture, RopeConfig
from folovllm.outputs import EngineCoreOutput, ModelRunnerOutput
from folovllm.parallel import ParallelConfig
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from folovllm.utils import cdiv

# A drive that needs more is stuck. With a budget of 1 token, 50 requests of 24 tokens rightly take over 1,000 steps.
MAX_STEPS = 20_000


def tiny_arch(
    max_position_embeddings: int = 4096, vocab_size: int = 1000, num_hidden_layers: int = 1
) -> ModelArchitecture:
    """One layer, one head of size one: 8 bytes of KV per token in float32."""
    return ModelArchitecture(
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_hidden_layers=num_hidden_layers,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1,
        vocab_size=vocab_size,
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
    """A resolved config from flat arguments of the cache and the scheduler, whether their rungs are built or not.

    `pipeline_parallel_size` gives the model that many layers, one for each stage.
    """
    cache_names = CacheConfig.__dataclass_fields__
    cache = {name: args.pop(name) for name in list(args) if name in cache_names}
    vocab_size, num_stages = args.pop("vocab_size", 1000), args.pop("pipeline_parallel_size", 1)
    config = EngineConfig(
        parts=args.pop("parts", None),
        trace=args.pop("trace", None),
        model_config=ModelConfig(max_model_len=max_model_len),
        cache_config=CacheConfig(block_size=block_size, **cache),
        scheduler_config=SchedulerConfig(**args),
        parallel_config=ParallelConfig(pipeline_parallel_size=num_stages),
    )
    return config.resolve(tiny_arch(max(max_model_len, 64), vocab_size, num_stages), "cpu")


class AttendingExecutor(FakeExecutor):
    """A FakeExecutor that reads the whole context for every sampled token, as attention does.

    The plain one reads only the last slot, so a block in the *middle* of a sequence that another request overwrote
    would go unnoticed. This one also holds the scheduler to its own counts.
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

    def _attend(self, request_id: str, state: FakeRequest) -> None:
        assert state.num_computed_tokens == len(state.token_ids), f"{request_id} samples in mid-prompt"
        digest = ROOT
        for position, token_id in enumerate(state.token_ids):
            digest = mix(digest, token_id)
            assert self._read(state, position) == digest, f"{request_id}: slot of position {position} was overwritten"


def make_core(executor: Executor | None = None, **config_args: Any) -> EngineCore:
    """EngineCore on an AttendingExecutor. E.g. make_core(block_size=4, num_kv_blocks=5, batching="static").

    With `pipeline_parallel_size`, give it a FakePipeline of that many stages.
    """
    return EngineCore(make_config(**config_args), executor or AttendingExecutor())


def make_request(request_id: str, prompt: int | Sequence[int], max_tokens: int = 100, **args: Any) -> Request:
    """A request, greedy unless a temperature is given; `prompt` is the token ids or only how many.

    `args` go to SamplingParams where it knows them, else to Request. EOS is ignored unless eos_token_id is given.
    """
    if isinstance(prompt, int):
        prompt = [(sum(map(ord, request_id)) * 31 + i * 7) % 1000 for i in range(prompt)]
    names = SamplingParams.__dataclass_fields__
    params = {name: args.pop(name) for name in list(args) if name in names}
    params.setdefault("ignore_eos", "eos_token_id" not in args)
    params.setdefault("temperature", 0.0)
    sampling_params = SamplingParams(max_tokens=max_tokens, **params)
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


def steps_of(core: EngineCore, arrivals: Iterable[tuple[int, Request]], max_steps: int = MAX_STEPS) -> Iterator[int]:
    """Yields the number of each step that the caller is to run, until no request is left or after `max_steps`.

    `arrivals` are requests with the step before which each arrives.
    """
    waiting = sorted(arrivals, key=lambda arrival: arrival[0])
    for step in range(max_steps):
        while waiting and waiting[0][0] <= step:
            core.add_request(waiting.pop(0)[1])
        if not waiting and not core.has_unfinished_requests():
            return
        yield step


def drive(core: EngineCore, max_steps: int = MAX_STEPS) -> dict[str, list[EngineCoreOutput]]:
    """Step until nothing is left, with the integrity check after every step; all outputs by request."""
    outputs: dict[str, list[EngineCoreOutput]] = {}
    for _ in range(max_steps):
        if not core.has_unfinished_requests():
            return outputs
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        check_core(core)
    raise AssertionError(f"not done after {max_steps} steps: {core.stats()}")


def tokens_of(outputs: Iterable[EngineCoreOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.new_token_ids]


def schedule_and_run(core: EngineCore) -> SchedulerOutput:
    """One step like EngineCore.step, but answering what was scheduled."""
    scheduler_output = core.scheduler.schedule()
    runner_output = core.executor.sample(core.executor.execute(scheduler_output))
    core.scheduler.update_from_output(scheduler_output, runner_output)
    check_core(core)
    return scheduler_output


def block_ids(core: EngineCore, request_id: str) -> list[int]:
    return core.scheduler.kv_cache_manager.get_block_ids(request_id)[0]


def check_core(core: EngineCore) -> None:
    """Runs the core's own integrity check. Also, each request must hold as many blocks as its computed tokens need."""
    core.scheduler.check_integrity()
    for request in core.scheduler.running:
        needed = cdiv(request.num_computed_tokens, core.kv_cache_config.block_size)
        assert len(block_ids(core, request.request_id)) == needed, request


def assert_nothing_leaked(core: EngineCore) -> None:
    """Asserts that no request is left and that every block is free again."""
    scheduler = core.scheduler
    scheduler.check_integrity()
    assert not scheduler.requests and not scheduler.running and not len(scheduler.waiting)
    assert not scheduler.kv_cache_manager.req_to_blocks
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_blocks - 1 and pool.usage == 0.0


# ---- random workloads


@dataclass(frozen=True)
class Workload:
    """Requests, the step before which each arrives, and the engine arguments that they run with.

    `arrivals` holds (step, arguments of make_request), sorted by step. `aborts` holds (step, request id): the request
    is aborted before that step, wherever it is by then.
    """

    config_args: dict[str, Any]
    arrivals: tuple[tuple[int, dict[str, Any]], ...]
    aborts: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        requests = ", ".join(
            f"{args['request_id']} of {len(args['prompt'])}+{args['max_tokens']} tokens"
            + (f" at step {step}" if step else "")
            for step, args in self.arrivals
        )
        requests += "".join(f", {request_id} aborted at step {step}" for step, request_id in self.aborts)
        switched_on = {name: value for name, value in self.config_args.items() if value is not False}
        return f"{requests}; {', '.join(f'{name}={value!r}' for name, value in switched_on.items())}"


def random_workload(seed: int, milestone: str = "m3", *, with_aborts: bool = False, **config_args: Any) -> Workload:
    """Returns a workload of the engine as of `milestone`, the same for the same seed. Small seeds are small workloads.

    The cache is tight: from M3 on, requests that grow are preempted. `config_args` take the place of drawn arguments.
    If `with_aborts`, about one request in four is aborted some steps after it arrived.
    """
    rng = random.Random(seed)
    config = toy_config_args(milestone, rng) | config_args
    step, arrivals = 0, list[tuple[int, dict[str, Any]]]()
    prefix = [rng.randrange(1000) for _ in range(config["max_model_len"])]
    for i in range(2 + seed // 3):
        prompt = [rng.randrange(1000) for _ in range(rng.randint(1, config["max_model_len"] // 2))]
        if config.get("enable_prefix_caching") and rng.random() < 0.7:
            shared = rng.randint(1, len(prompt))
            prompt = prefix[:shared] + prompt[shared:]
        max_tokens = rng.randint(1, config["max_model_len"] // 2)
        args = {"request_id": f"r{i}", "prompt": prompt, "max_tokens": max_tokens}
        if config.get("scheduling_policy") == "priority":
            args["priority"] = rng.randint(0, 2)
        arrivals.append((step, args))
        step += rng.choice((0, 0, 1, 3))
    aborts = [
        (step + rng.randint(0, 8), args["request_id"]) for step, args in arrivals if with_aborts and rng.random() < 0.25
    ]
    return Workload(config, tuple(arrivals), tuple(sorted(aborts)))


def toy_config_args(milestone: str, rng: random.Random) -> dict[str, Any]:
    """Returns arguments of make_core for the engine as of `milestone`, with small numbers drawn from `rng`."""
    switches = milestones.fold("m1" if milestone == "m0" else milestone)  # m0 has no engine
    known = CacheConfig.__dataclass_fields__ | SchedulerConfig.__dataclass_fields__
    args: dict[str, Any] = {"max_model_len": 16} | {name: switches[name] for name in switches if name in known}
    block_size = 16 if args["block_size"] == "max_model_len" else rng.choice((1, 2, 4))
    per_request = cdiv(16, block_size)
    args["block_size"] = block_size
    args["num_kv_blocks"] = 1 + per_request + rng.randint(0, 2 * per_request)
    args["max_num_seqs"] = args["max_num_seqs"] or rng.randint(2, 5)
    if args["enable_chunked_prefill"]:
        args["max_num_batched_tokens"] = rng.randint(3, 12)
    return args


def run_workload(
    workload: Workload, parts: Mapping[str, str] | None = None, trace: str | Path | None = None
) -> dict[str, list[int]]:
    """Runs a workload to its end, with the integrity check after every step. Returns the tokens of each request.

    Raises AssertionError if the tokens are not those that each request gets alone (an aborted one: not the first of
    them), or if a block is left over.
    """
    core = make_core(**workload.config_args, parts=parts, trace=None if trace is None else str(trace))
    waiting, aborts = list(workload.arrivals), list(workload.aborts)
    outputs: dict[str, list[int]] = {}
    expected: dict[str, list[int]] = {}
    try:
        for step in range(MAX_STEPS):
            while waiting and waiting[0][0] <= step:
                request = make_request(**waiting.pop(0)[1])
                expected[request.request_id] = expected_tokens(request, workload.config_args["max_model_len"])
                core.add_request(request)
            while aborts and aborts[0][0] <= step:
                core.abort_requests([aborts.pop(0)[1]])
            if not waiting and not core.has_unfinished_requests():
                break
            for output in core.step():
                outputs.setdefault(output.request_id, []).extend(output.new_token_ids)
            check_core(core)
        else:
            raise AssertionError(f"not done after {MAX_STEPS} steps: {core.stats()}")
    finally:
        core.shutdown()
    for request_id, tokens in expected.items():
        got, is_aborted = outputs.get(request_id, []), request_id in {name for _, name in workload.aborts}
        expected_now = tokens[: len(got)] if is_aborted else tokens
        assert got == expected_now, f"{request_id} generated {got}, but alone it generates {expected_now}"
    assert_nothing_leaked(core)
    return outputs
