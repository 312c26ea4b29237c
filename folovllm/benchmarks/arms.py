"""Arms: the engines that a benchmark sets beside each other, how they are named, and how FoloVLLM is driven as one.

Milestone: M1; engine arguments in a name came with M5. vLLM counterpart: vllm/benchmarks/throughput.py, which sees only
the whole run, while EngineArm drives the engine step by step and looks at every step. No torch until an engine is made:
the parent process of a benchmark must cost no memory or time beside the arms. The baseline is in hf_arm.py.
"""

import dataclasses
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from folovllm import milestones
from folovllm.benchmarks.workloads import WORKLOADS, BenchRequest, Feed, Workload, make_workload
from folovllm.config import EngineConfig, engine_arg_names
from folovllm.hf_config import load_hf_config
from folovllm.outputs import RequestOutput
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.utils import cdiv, unknown_name_message

if TYPE_CHECKING:
    from folovllm.engine.llm_engine import LLMEngine

BASELINE = "hf"
BANDWIDTH = "bandwidth"  # not an arm: measures the memory
WEIGHTS = "weights"  # not an arm: writes the checkpoint of a shape
SHORT_NAMES = {"budget": "max_num_batched_tokens"}


class ArmSpec(NamedTuple):
    """A FoloVLLM engine: a preset, rungs taken off, and engine arguments over it."""

    preset: str
    without: tuple[str, ...]
    engine_args: dict[str, Any]


def parse_arm(arm: str) -> ArmSpec:
    """E.g. "m3-m2" -> m3 without m2; "m5+budget=256" -> m5 with max_num_batched_tokens=256.

    Raises ValueError if there is no such milestone or engine argument.
    """
    ladder, *settings = arm.split("+")
    preset, *without = ladder.split("-")
    milestones.fold(preset, without)
    return ArmSpec(preset, tuple(without), dict(map(_parse_setting, settings)))


def _parse_setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} in an arm is not of the form name=value, as in m5+budget=256")
    name = SHORT_NAMES.get(name, name)
    if name not in engine_arg_names():
        raise ValueError(unknown_name_message("engine argument", name, list(engine_arg_names())))
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a bare word, as in attention_backend=torch_flash


def in_words(text: str) -> str:
    """`text` with the names of arms as tables and plots show them. E.g. "m7-m6 batch" -> "m7 without m6 batch"."""
    return re.sub(r"\b(m\d+)-(m\d+(?:-m\d+)*)", lambda m: f"{m[1]} without {m[2].replace('-', ' and ')}", text)


def default_arms(workload: str = "A") -> list[str]:
    """Every rung that has an engine of its own, as far as the workload was made for it."""
    built = [rung.id for rung in milestones.engine_rungs()]
    rungs = WORKLOADS[workload].rungs
    return [rung for rung in built if rungs is None or rung in rungs] or built[-1:]


def ablation_arms(top: str | None = None) -> list[str]:
    """Everything up to `top` on, then each rung off alone. E.g. for m3: ["m3", "m3-m2", "m3-m3"]."""
    built = default_arms()
    up_to = built[: built.index(top) + 1] if top else built
    removable = [rung.id for rung in milestones.LADDER if rung.id in up_to and rung.off]
    return [up_to[-1], *(f"{up_to[-1]}-{rung}" for rung in removable)]


# ---- what an arm is asked, and what it answers


@dataclass(frozen=True)
class ArmTask:
    """One arm, measured once by a process of its own, to which this travels as JSON.

    `arm` is "hf", "bandwidth", "weights" or a name that `parse_arm` reads.
    """

    arm: str
    model_path: str
    vocab_size: int
    workload: str
    num_requests: int | None
    modes: tuple[str, ...]
    device: str  # "cpu" | "cuda"
    dtype: str
    threads: int
    max_model_len: int
    kv_cache_memory: int  # bytes
    batch_sizes: tuple[int, ...] = ()
    bandwidth_bytes: int = 1024**3
    hit_rates: tuple[int, ...] = ()
    shape: str | None = None  # of random weights; None: model_path is a real model
    num_single: int | None = None  # requests that "single" sends; None: as many as the workload says
    label: str = ""  # what to call it where one arm runs twice, with other workloads

    @property
    def name(self) -> str:
        return self.label or self.arm

    def make_workload(self) -> Workload:
        workload = make_workload(self.workload, self.vocab_size, self.num_requests, self.hit_rates)
        return dataclasses.replace(workload, num_single=self.num_single) if self.num_single else workload

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ArmTask":
        plain: dict[str, Any] = json.loads(text)
        lists = {key: tuple(value) for key, value in plain.items() if isinstance(value, list)}
        return cls(**plain | lists)


@dataclass(frozen=True)
class RequestTiming:
    """What one request cost: seconds from arrival to its first token, and the gaps between its later ones."""

    prompt_len: int
    output_len: int
    time_to_first_token: float
    inter_token_latencies: list[float]
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache

    @property
    def time_per_output_token(self) -> float | None:
        """Mean gap in seconds; None for a single token, which has no gap."""
        gaps = self.inter_token_latencies
        return sum(gaps) / len(gaps) if gaps else None


@dataclass(frozen=True)
class StepSample:
    """The engine after one step. `num_running` counts the requests that ran in it, the finished ones included."""

    seconds: float  # since the start of the mode
    num_running: int
    num_used_slots: int
    num_reserved_slots: int


@dataclass
class Run:
    """What came back for some requests sent together, in their order."""

    seconds: float = 0.0
    tokens: list[list[int]] = field(default_factory=list)
    timings: list[RequestTiming] = field(default_factory=list)
    samples: list[StepSample] = field(default_factory=list)
    num_preemptions: int = 0

    def then(self, later: "Run") -> "Run":
        """This run and one that began when it had ended, as one."""
        moved = [dataclasses.replace(sample, seconds=self.seconds + sample.seconds) for sample in later.samples]
        return Run(
            self.seconds + later.seconds,
            self.tokens + later.tokens,
            self.timings + later.timings,
            self.samples + moved,
            self.num_preemptions + later.num_preemptions,
        )


class Arm(Protocol):
    """FoloVLLM or a baseline, ready to answer requests."""

    def run(self, requests: list[BenchRequest]) -> Run:
        """Answer `requests`: all sent at once, but for those that arrive later or follow another's answer."""

    def forget(self) -> None:
        """Empty the prefix cache, where there is one."""

    def info(self) -> dict[str, Any]:
        """Settings and sizes for the result file."""


class EngineArm:
    """A FoloVLLM engine as of some milestone. Like the baseline it makes no text, and needs no tokenizer."""

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
            seconds, stats = time.monotonic() - start, engine.stats()
            num_running = stats.num_running + len(outputs)
            run.samples.append(StepSample(seconds, num_running, stats.num_used_slots, stats.num_reserved_slots))
        run.seconds = time.monotonic() - start
        run.num_preemptions = engine.stats().num_preemptions - preempted_before
        run.tokens = [finished[i].outputs[0].token_ids for i in range(len(requests))]
        run.timings = [_timing(finished[i]) for i in range(len(requests))]
        return run

    def forget(self) -> None:
        is_empty = self.engine.reset_prefix_cache()
        assert is_empty, "the engine is idle, so no request can hold a cached block"

    def info(self) -> dict[str, Any]:
        config, kv, section_of = self.engine.config, self.engine.engine_core.kv_cache_config, engine_arg_names()
        # The resolved values of the arguments that the ladder switches.
        settings = {name: getattr(getattr(config, section_of[name]), name) for name in milestones.fold("m1")}
        sizes = {
            "block_size": kv.block_size,
            "num_usable_blocks": kv.num_usable_blocks,
            "usable_slots": kv.num_usable_blocks * kv.block_size,
            "allocated_bytes": kv.num_blocks * kv.bytes_per_block,
            "null_block_bytes": kv.null_block_bytes,
            "fits_at_full_length": kv.num_usable_blocks // cdiv(config.max_model_len, kv.block_size),
        }
        return {"settings": settings, "kv_cache": sizes}

    def _clock(self, feed: Feed, index_of: dict[str, int]) -> float:
        """Tokens that each of the steady requests has, on average; counted only while a request waits to arrive."""
        if not feed.waits_for_arrivals:
            return 0.0
        steady, alive = feed.steady(), self.engine.engine_core.scheduler.requests
        tokens = {index: len(alive[i].output_token_ids) for i, index in index_of.items() if i in alive}
        sent = set(index_of.values())
        # A request that was sent and is no longer alive has finished: it has all its tokens.
        total = sum(tokens.get(i, feed.requests[i].output_len if i in sent else 0) for i in steady)
        return total / len(steady)

    def _send(self, request: BenchRequest, arrival_time: float) -> str:
        params = SamplingParams(
            temperature=request.temperature,
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
    from folovllm.platforms import has_fast_bf16

    spec, folder = parse_arm(task.arm), Path(task.model_path)
    args = {
        "model": task.model_path,
        "dtype": task.dtype,
        "device": task.device,
        "max_model_len": task.max_model_len,
        "kv_cache_memory": task.kv_cache_memory,
    }
    config = EngineConfig.from_args(spec.preset, spec.without, **{**args, **spec.engine_args})
    arch = load_hf_config(folder, config.model_config.hf_overrides)
    config = config.resolve(arch, task.device, has_fast_bf16(task.device, config.kernel_config))
    return LLMEngine(config, UniProcExecutor(config, folder), tokenizer=None)


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
