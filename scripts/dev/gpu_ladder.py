"""Tokens per second on a GPU: every rung of the ladder, GPTQ, and HuggingFace generate beside them, in one process.

Milestone: M4. vLLM counterpart: vllm/benchmarks. The models have the shapes of public ones and random weights, which
are drawn on the GPU (load_format="dummy"), so nothing is downloaded and nothing large is written. Three modes:

    single   one request alone
    batch    32 requests at once
    nano     the workload of nano-vllm's benchmark: 256 requests of 100-1,024 tokens in and out, temperature 0.6.
             HuggingFace gets the first 64, greedy and as one static batch, so that it fits into the time

Each mode runs once with short outputs, which compiles kernels, and then `repeats` times, of which the median counts.
HuggingFace, which compiles nothing, and nano run once. The cases come in the order of their worth. A case is not begun
if less time is left than it may need, and it is left out if its weights and a batch do not fit into the GPU's memory.

    itl_ms, context              median time between two tokens of a request; tokens of a request, half-way
    floor_ms, of_floor           the measured floor of such a step with this context (gpu_machine.py); floor / time
    x_hf, x_bf16                 output tokens per second, as a multiple of HuggingFace's and of the last rung's in
                                 bf16, if those had the same requests: in nano, HuggingFace has not

    python scripts/dev/gpu_ladder.py [--device cuda|cpu] [--out DIR]
"""

import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_machine import ceilings, measured_hardware
from gpu_result import Case, Options, Result, Row, parse_options

from folovllm.benchmarks.arms import BASELINE, Arm, ArmTask, EngineArm, Run
from folovllm.benchmarks.metrics import speed_figures
from folovllm.benchmarks.workloads import BenchRequest, random_ids
from folovllm.core.kv_cache_utils import GIB
from folovllm.gptq_config import GPTQConfig
from folovllm.milestones import engine_rungs, top_rung
from folovllm.model_shapes import shape_architecture, shape_config
from folovllm.sim.hardware import Hardware
from folovllm.sim.kernel_cost import gptq_bytes_per_weight, step_work, weight_bytes

TOP = top_rung().id
GPTQ = f"{TOP} GPTQ"
GROUP_SIZE = 128
SINGLE, BATCH, NANO = "single", "batch", "nano"
SHOWN = ("output_tok_per_s", "itl_ms", "floor_ms", "of_floor", "x_hf", "x_bf16")
WARM_UP_TOKENS = 8
FREE_SHARE, RESERVE = 0.9, 2 * GIB  # of the free memory, the KV cache gets what weights and RESERVE leave of this share


@dataclass(frozen=True)
class Sizes:
    small: str  # shapes
    large: str
    dtype: str
    max_model_len: int
    single: tuple[int, int]  # tokens in and out
    batch: int  # requests
    nano: tuple[int, int, int]  # requests, and the range of tokens in and out
    hf_nano: int
    repeats: int
    kv_bytes: int | None  # None: by the free memory
    seconds: dict[str, float]  # which a mode of an arm may need


SIZES = {
    "cuda": Sizes(
        "qwen3-0.6b", "qwen3-8b", "bfloat16", 2048, (128, 128), 32, (256, 100, 1024), 64, 3, None,
        {SINGLE: 10, BATCH: 8, NANO: 40},
    ),
    "cpu": Sizes("tiny", "tiny", "float32", 64, (8, 4), 2, (3, 4, 8), 2, 1, 2**24, {SINGLE: 1, BATCH: 1, NANO: 1}),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What is measured: an arm on a shape, in one mode."""

    shape: str
    arm: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.shape} {self.arm} {self.mode}"


def entries(sizes: Sizes) -> list[Entry]:
    """In the order of their worth. The first rung answers one request at a time: a batch would take it too long."""
    small, large = sizes.small, sizes.large
    others = [rung.id for rung in reversed(engine_rungs()) if rung.id != TOP]
    found = [
        *(Entry(small, TOP, mode) for mode in (SINGLE, BATCH, NANO)),
        *(Entry(large, arm, mode) for arm in (TOP, GPTQ) for mode in (SINGLE, BATCH)),
        *(Entry(shape, BASELINE, mode) for shape in (small, large) for mode in (SINGLE, BATCH)),
        *(Entry(small, rung, mode) for rung in others for mode in (SINGLE, BATCH)[: 1 + (rung != others[-1])]),
        Entry(small, BASELINE, NANO),
    ]
    return list(dict.fromkeys(found))  # in a rehearsal, both shapes are the same


def requests_of(entry: Entry, sizes: Sizes) -> list[BenchRequest]:
    vocab_size = shape_architecture(entry.shape).vocab_size
    if entry.mode == NANO:
        requests = nano_requests(*sizes.nano, vocab_size)
        return requests[: sizes.hf_nano] if entry.arm == BASELINE else requests
    rng, (num_in, num_out) = random.Random(0), sizes.single
    count = 1 if entry.mode == SINGLE else sizes.batch
    return [BenchRequest(random_ids(rng, num_in, vocab_size), num_out) for _ in range(count)]


def nano_requests(count: int, shortest: int, longest: int, vocab_size: int) -> list[BenchRequest]:
    """The requests of nano-vllm's bench.py: all prompts are drawn before the lengths of the outputs."""
    rng = random.Random(0)
    prompts = [
        [rng.randint(0, min(10_000, vocab_size - 1)) for _ in range(rng.randint(shortest, longest))]
        for _ in range(count)
    ]
    return [BenchRequest(prompt, rng.randint(shortest, longest), temperature=0.6) for prompt in prompts]


# ---- arms


class Loaded:
    """The arm in use; another one takes its place and its memory."""

    def __init__(self, options: Options, sizes: Sizes, folder: Path) -> None:
        self.options, self.sizes, self.folder = options, sizes, folder
        self.key: tuple[str, str] | None = None
        self.arm: Arm | None = None

    def get(self, entry: Entry) -> Arm:
        if self.key != (entry.shape, entry.arm):
            self.key = self.arm = None
            gc.collect()
            if self.options.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            self.arm = self._load(entry)
            self.key = (entry.shape, entry.arm)
        assert self.arm is not None
        return self.arm

    def _load(self, entry: Entry) -> Arm:
        task = self._task(entry)
        if entry.arm != BASELINE:
            return EngineArm(task)
        from folovllm.benchmarks.hf_arm import HFArm

        return HFArm(task, random_hf(task))

    def _task(self, entry: Entry) -> ArmTask:
        is_gptq = entry.arm == GPTQ
        folder = self.folder / entry.name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config_of(entry.shape, is_gptq)))
        preset = TOP if is_gptq else entry.arm
        settings = "+load_format=dummy" + ("+gptq_kernel=triton" if is_gptq else "")
        return ArmTask(
            arm=entry.arm if entry.arm == BASELINE else preset + settings,
            model_path=str(folder),
            vocab_size=shape_architecture(entry.shape).vocab_size,
            workload="",
            num_requests=None,
            modes=(),
            device=self.options.device,
            dtype=self.sizes.dtype,
            threads=torch.get_num_threads(),
            max_model_len=self.sizes.max_model_len,
            kv_cache_memory=self.sizes.kv_bytes or free_kv_bytes(entry, self.sizes, torch.cuda.mem_get_info()[0]),
        )


def config_of(shape: str, is_gptq: bool) -> dict[str, Any]:
    """config.json of the shape, with 4 bits or without."""
    quantization = {"quantization_config": GPTQConfig(4, GROUP_SIZE).to_json(damp=0.01, quantizer="random")}
    return shape_config(shape) | (quantization if is_gptq else {})


def free_kv_bytes(entry: Entry, sizes: Sizes, free: int) -> int:
    """What `free` bytes leave beside the arm's own weights. MemoryError if a batch does not fit into that.

    A batch fits into the least cache, so arms of one shape compare even if the one with smaller weights gets more.
    """
    arch = shape_architecture(entry.shape)
    weights = int(weight_bytes(arch, linear_width(entry.arm)))
    kv_bytes, least = int(FREE_SHARE * free) - weights - RESERVE, batch_kv_bytes(entry.shape, sizes)
    if kv_bytes < least:
        raise MemoryError(
            f"{weights / GIB:.1f} GiB of weights, {RESERVE / GIB:.1f} for activations and {least / GIB:.1f} for K and "
            f"V are more than {FREE_SHARE:.0%} of {free / GIB:.1f} GiB"
        )
    return kv_bytes


def batch_kv_bytes(shape: str, sizes: Sizes) -> int:
    """K and V of a batch, or of the longest request that the engine must be able to serve; in bf16."""
    num_tokens = max(sizes.batch * sum(sizes.single), sizes.max_model_len)
    return num_tokens * shape_architecture(shape).kv_bytes_per_token(2)


def random_hf(task: ArmTask) -> Any:
    """transformers' model of the shape, with the random weights of its own initialisation, drawn on the device."""
    import transformers

    transformers.logging.set_verbosity_error()
    config, dtype = transformers.AutoConfig.from_pretrained(task.model_path), getattr(torch, task.dtype)
    with torch.device(task.device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = transformers.GenerationConfig()
    return model.eval()


# ---- measuring


def measure(entry: Entry, loaded: Loaded, hardware: Hardware) -> list[Row]:
    start = time.perf_counter()
    arm, requests = loaded.get(entry), requests_of(entry, loaded.sizes)
    load_seconds = time.perf_counter() - start
    arm.run([replace(request, output_len=min(request.output_len, WARM_UP_TOKENS)) for request in requests])
    repeats = 1 if entry.mode == NANO or entry.arm == BASELINE else loaded.sizes.repeats
    runs = sorted((run_anew(arm, requests) for _ in range(repeats)), key=lambda run: run.seconds)
    run = runs[len(runs) // 2]
    figures = speed_figures(run.timings, run.seconds)
    itl = figures["itl_ms"]["p50"]
    floor = step_floor(entry, requests, hardware)
    return [
        {
            "case": entry.name,
            "shape": entry.shape,
            "arm": entry.arm,
            "mode": entry.mode,
            "requests": len(requests),
            "output_tok_per_s": round(figures["output_tok_per_s"], 1),
            "ttft_ms": round(figures["ttft_ms"]["p50"], 2),
            "itl_ms": round(itl, 3),
            "context": round(statistics.mean(contexts_of(requests))),
            "floor_ms": round(1e3 * floor, 3),
            "of_floor": round(1e3 * floor / itl, 3),
            "seconds": round(run.seconds, 2),
            "steps": len(run.samples),
            "preemptions": run.num_preemptions,
            "load_s": round(load_seconds, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 1) if hardware.memory else None,
        }
    ]


def run_anew(arm: Arm, requests: list[BenchRequest]) -> Run:
    arm.forget()
    return arm.run(requests)


def contexts_of(requests: Sequence[BenchRequest]) -> list[int]:
    """Tokens of each request when it is half-way through its output."""
    return [len(request.prompt_token_ids) + request.output_len // 2 for request in requests]


def step_floor(entry: Entry, requests: Sequence[BenchRequest], hardware: Hardware) -> float:
    """The floor in seconds of a decode step in which all requests are half-way through their outputs."""
    contexts = [(context, 1) for context in contexts_of(requests)]
    return step_work(shape_architecture(entry.shape), contexts, linear_width(entry.arm)).seconds(hardware)


def linear_width(arm: str) -> float:
    """Bytes of a weight of a linear layer."""
    return gptq_bytes_per_weight(4, GROUP_SIZE) if arm == GPTQ else 2.0


def add_ratios(rows: list[Row]) -> None:
    """x_hf and x_bf16 of every row whose counterpart has been measured with the same requests."""
    speeds = {(row["shape"], row["arm"], row["mode"], row["requests"]): row["output_tok_per_s"] for row in rows}
    for row in rows:
        for name, arm in (("x_hf", BASELINE), ("x_bf16", TOP)):
            other = speeds.get((row["shape"], arm, row["mode"], row["requests"]))
            if other and (name == "x_hf" or row["arm"] == GPTQ):
                row[name] = round(row["output_tok_per_s"] / other, 2)


def main() -> int:
    options = parse_options(__doc__ or "")
    sizes, hardware = SIZES[options.device], measured_hardware(options)
    facts = {"ceilings": ceilings(hardware), "dtype": sizes.dtype}
    result = Result("ladder", "tokens per second", options, SHOWN, add_ratios, **facts)
    with tempfile.TemporaryDirectory() as folder:
        loaded, seconds = Loaded(options, sizes, Path(folder)), sizes.seconds
        found = entries(sizes)
        return result.run([Case(e.name, partial(measure, e, loaded, hardware), seconds[e.mode]) for e in found])


if __name__ == "__main__":
    sys.exit(main())
