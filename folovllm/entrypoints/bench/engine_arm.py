"""EngineArm: a FoloVLLM engine as of some milestone, driven step by step so that every step can be looked at.

Milestone: M1. vLLM counterpart: vllm/benchmarks/throughput.py (which sees only the whole run).
"""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from folovllm import milestones
from folovllm.config import EngineConfig, engine_arg_names
from folovllm.core.kv_cache_utils import KVCacheConfig, cdiv
from folovllm.entrypoints.bench.measure import RequestTiming, StepSample
from folovllm.entrypoints.bench.task import ArmTask, split_arm
from folovllm.entrypoints.bench.workloads import BenchRequest
from folovllm.outputs import EngineStats, RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams


@dataclass
class Run:
    """What came back for some requests sent together, in their order."""

    seconds: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)
    timings: list[RequestTiming] = field(default_factory=list)
    samples: list[StepSample] = field(default_factory=list)
    num_preemptions: int = 0


class Arm(Protocol):
    """Someone who answers requests: an engine of ours or a baseline."""

    def run(self, requests: list[BenchRequest]) -> Run:
        """Answer `requests`, all sent at once."""
        ...

    def info(self) -> dict[str, Any]:
        """Settings and sizes worth writing down."""
        ...


class EngineArm:
    """`task.arm` names the preset. Text is not made from the tokens: the baseline does not either."""

    def __init__(self, task: ArmTask) -> None:
        from folovllm.entrypoints.llm import LLM

        preset, without = split_arm(task.arm)
        self.llm = LLM(
            task.model_path,
            preset=preset,
            without=without,
            dtype=task.dtype,
            device=task.device,
            max_model_len=task.max_model_len,
            kv_cache_memory=task.kv_cache_memory,
        )
        self._num_sent = 0

    def run(self, requests: list[BenchRequest]) -> Run:
        """Send all, step until all have finished. The clock starts before the first is sent."""
        engine, run = self.llm.llm_engine, Run()
        finished: dict[str, RequestOutput] = {}
        preempted_before = engine.stats().num_preemptions
        start = time.monotonic()
        ids = [self._send(request, start) for request in requests]
        while engine.has_unfinished_requests():
            outputs = engine.step()  # FINAL_ONLY: what comes out has finished
            finished |= {output.request_id: output for output in outputs}
            run.samples.append(_sample(time.monotonic() - start, engine.stats(), len(outputs)))
        run.seconds = time.monotonic() - start
        run.num_preemptions = engine.stats().num_preemptions - preempted_before
        run.tokens = [finished[i].outputs[0].token_ids for i in ids]
        run.timings = [_timing(finished[i]) for i in ids]
        return run

    def info(self) -> dict[str, Any]:
        config, kv = self.llm.config, self.llm.llm_engine.engine_core.kv_cache_config
        return {"settings": switches(config), "kv_cache": kv_sizes(kv, config.max_model_len)}

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
        self.llm.llm_engine.add_request(request_id, prompt, params, arrival_time)
        return request_id


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
    )
