"""EngineArm: a FoloVLLM engine as of some milestone, driven step by step so that every step can be looked at.

Milestone: M1. vLLM counterpart: vllm/benchmarks/throughput.py (which sees only the whole run).
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from folovllm import milestones
from folovllm.benchmarks.measure import RequestTiming, StepSample
from folovllm.benchmarks.requests import BenchRequest, Feed
from folovllm.benchmarks.task import ArmTask, parse_arm
from folovllm.config import EngineConfig, engine_arg_names
from folovllm.core.kv_cache_utils import KVCacheConfig, cdiv
from folovllm.hf_config import load_hf_config
from folovllm.outputs import EngineStats, RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from folovllm.engine.llm_engine import LLMEngine


@dataclass
class Run:
    """What came back for some requests sent together, in their order."""

    seconds: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)
    timings: list[RequestTiming] = field(default_factory=list)
    samples: list[StepSample] = field(default_factory=list)
    num_preemptions: int = 0

    def then(self, later: "Run") -> "Run":
        """This run and one that began when it was over, as one."""
        moved = [
            StepSample(self.seconds + s.seconds, s.num_running, s.num_used_slots, s.num_reserved_slots)
            for s in later.samples
        ]
        return Run(
            self.seconds + later.seconds,
            self.tokens + later.tokens,
            self.timings + later.timings,
            self.samples + moved,
            self.num_preemptions + later.num_preemptions,
        )


class Arm(Protocol):
    """Someone who answers requests: an engine of ours or a baseline."""

    def run(self, requests: list[BenchRequest]) -> Run:
        """Answer `requests`: all sent at once, but for those that arrive later or follow another's answer."""
        ...

    def forget(self) -> None:
        """Empty the prefix cache, where there is one."""
        ...

    def info(self) -> dict[str, Any]:
        """Settings and sizes worth writing down."""
        ...


class EngineArm:
    """`task.arm` names the preset. No tokenizer, and no text is made from the tokens: the baseline does not either."""

    def __init__(self, task: ArmTask) -> None:
        self.engine = make_engine(task)
        self._num_sent = 0

    def run(self, requests: list[BenchRequest]) -> Run:
        """Send what is due, step, until all have finished. The clock starts before the first is sent."""
        engine, run, feed = self.engine, Run(), Feed(requests)
        index_of: dict[str, int] = {}  # request id -> index
        finished: dict[int, RequestOutput] = {}
        preempted_before = engine.stats().num_preemptions
        start = time.monotonic()
        while len(finished) < len(requests):
            idle = not engine.has_unfinished_requests()
            for index in feed.due(self._clock(feed, index_of), idle):
                index_of[self._send(feed.complete(index), time.monotonic() if index_of else start)] = index
            outputs = engine.step()  # FINAL_ONLY: what comes out has finished
            for output in outputs:
                index = index_of[output.request_id]
                finished[index] = output
                feed.answered(index, output.outputs[0].token_ids)
            run.samples.append(_sample(time.monotonic() - start, engine.stats(), len(outputs)))
        run.seconds = time.monotonic() - start
        run.num_preemptions = engine.stats().num_preemptions - preempted_before
        run.tokens = [finished[i].outputs[0].token_ids for i in range(len(requests))]
        run.timings = [_timing(finished[i]) for i in range(len(requests))]
        return run

    def forget(self) -> None:
        reset = getattr(self.engine, "reset_prefix_cache", None)  # there from M6 on
        assert reset is None or reset() is not False, "the engine is idle, so nothing can hold a cached block"

    def info(self) -> dict[str, Any]:
        config, kv = self.engine.config, self.engine.engine_core.kv_cache_config
        return {"settings": switches(config), "kv_cache": kv_sizes(kv, config.max_model_len)}

    def _clock(self, feed: Feed, index_of: dict[str, int]) -> float:
        """Tokens that each of the steady requests has got, on average; only asked for where someone is to arrive."""
        if not feed.waits_for_arrivals:
            return 0.0
        steady, alive = feed.steady(), self.engine.engine_core.scheduler.requests
        tokens = {index: len(alive[i].output_token_ids) for i, index in index_of.items() if i in alive}
        sent = set(index_of.values())
        # One that was sent and is not alive has finished: it has got all it wanted.
        total = sum(tokens.get(i, feed.requests[i].output_len if i in sent else 0) for i in steady)
        return total / len(steady)

    def _send(self, request: BenchRequest, arrival_time: float) -> str:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.output_len,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request_id = f"bench-{self._num_sent}"
        self._num_sent += 1
        prompt = {"prompt_token_ids": request.prompt_token_ids}
        self.engine.add_request(request_id, prompt, params, arrival_time)
        return request_id


def make_engine(task: ArmTask) -> "LLMEngine":
    """The engine that `LLM` would make, without a tokenizer: a folder of random weights has none."""
    from folovllm.engine.llm_engine import LLMEngine
    from folovllm.executor.uniproc import UniProcExecutor
    from folovllm.platforms import has_native_bf16

    spec, folder = parse_arm(task.arm), Path(task.model_path)
    args = {
        "model": task.model_path,
        "dtype": task.dtype,
        "device": task.device,
        "max_model_len": task.max_model_len,
        "kv_cache_memory": task.kv_cache_memory,
    }
    config = EngineConfig.from_args(spec.preset, spec.without, **{**args, **spec.engine_args})
    config = config.resolve(load_hf_config(folder), task.device, has_native_bf16(task.device))
    return LLMEngine(config, UniProcExecutor(config, folder), tokenizer=None)


def switches(config: EngineConfig) -> dict[str, Any]:
    """The resolved values of the arguments that the ladder switches."""
    part_of = engine_arg_names()
    return {name: getattr(getattr(config, part_of[name]), name) for name in milestones.fold("m1")}


def kv_sizes(kv: KVCacheConfig, max_model_len: int) -> dict[str, int]:
    """The cache in numbers; `fits_at_full_length` is how many requests of max_model_len it can hold."""
    return {
        "block_size": kv.block_size,
        "num_usable_blocks": kv.num_usable_blocks,
        "usable_slots": kv.num_usable_blocks * kv.block_size,
        "allocated_bytes": kv.num_blocks * kv.bytes_per_block,
        "null_block_bytes": kv.null_block_bytes,
        "fits_at_full_length": kv.num_usable_blocks // cdiv(max_model_len, kv.block_size),
    }


def _sample(seconds: float, stats: EngineStats, num_finished: int) -> StepSample:
    return StepSample(seconds, stats.num_running + num_finished, stats.num_used_slots, stats.num_reserved_slots)


def _timing(output: RequestOutput) -> RequestTiming:
    metrics = output.metrics
    assert metrics is not None and metrics.time_to_first_token is not None
    return RequestTiming(
        prompt_len=len(output.prompt_token_ids),
        output_len=len(output.outputs[0].token_ids),
        time_to_first_token=metrics.time_to_first_token,
        inter_token_latencies=metrics.inter_token_latencies,
        num_cached_tokens=max(output.num_cached_tokens or 0, 0),  # -1: never admitted
    )
