"""One arm of scripts/dev/profile_step.py: a decode step of the engine with later changes switched off, cut into parts.

Milestone: M4. vLLM counterpart: its torch profiler hooks (VLLM_TORCH_PROFILER_DIR), which show one state of the engine.
Left out: GPUs. The figures come from two passes of one process, undisturbed steps first, then steps under the profiler.
"""

import contextlib
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from folovllm.benchmarks.arms import ArmTask, make_engine
from folovllm.benchmarks.machine import measure_bandwidth
from folovllm.benchmarks.metrics import median_of
from folovllm.engine.llm_engine import LLMEngine
from folovllm.executor.uniproc import UniProcExecutor
from folovllm.model_executor.cpu.huge_pages import huge_zeros
from folovllm.model_executor.layers.activation import SiluAndMul
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.rotary_embedding import ApplyRotary
from folovllm.model_executor.models.llama import LlamaDecoderLayer
from folovllm.sampling_params import RequestOutputKind, SamplingParams
from folovllm.worker import model_runner

WARM_UP, PROFILED = 5, 5  # decode steps before the timed ones, and under the profiler after them
SPAN = "family:"
SPANS = {LinearBase: "linear", RMSNorm: "norm", ApplyRotary: "rotary", SiluAndMul: "silu", LlamaDecoderLayer: "layer"}
FAMILIES = ("linear", "attention", "kv_write", "norm", "rotary", "silu", "layer", "sampler", "other")
ALL_LAYERS = "folovllm::decoder_stack"
MATMUL_SIZE, MATMUL_REPEATS = 1024, 7

Figures = dict[str, Any]  # one arm at one batch size


# ---- the ladder


@dataclass(frozen=True)
class Rung:
    """An arm. `engine` is what `parse_arm` reads."""

    number: int
    change: str
    engine: str
    temperature: float = 0.0


HUGE = 7  # the first rung whose weights and KV cache lie in huge pages
# m4 with the changes switched off that later rungs turn on. What no rung is about (sampling, malloc) stays on.
_OFF = {
    "attention_backend": "torch_naive",
    "linear_backend": "torch",
    "fused_ops": "false",
    "fused_mlp": "false",
    "decoder_stack": "false",
    "huge_pages": "false",
}
_CHANGES: tuple[tuple[str, dict[str, str]], ...] = (
    ("plain torch", {}),
    ("+ oneDNN packing", {"linear_backend": "onednn"}),
    ("+ C++ linears, norm, rotary, SiLU", {"linear_backend": "auto", "fused_ops": "auto"}),
    ("+ cpu_paged attention", {"attention_backend": "cpu_paged"}),
    ("+ SiLU inside gate_up", {"fused_mlp": "auto"}),
    ("+ all layers in one call", {"decoder_stack": "auto"}),
    ("+ huge pages", {"huge_pages": "true"}),
)


def _ladder() -> Iterator[Rung]:
    """Each rung has the switches of those before it, and its own."""
    switches = dict(_OFF)
    for number, (change, own) in enumerate(_CHANGES, start=1):
        switches |= own
        engine = "+".join(["m4", *(f"{name}={value}" for name, value in switches.items())])
        yield Rung(number, change, engine)
    yield Rung(len(_CHANGES) + 1, "temperature 0.8, top_p 0.95", engine, temperature=0.8)


RUNGS = tuple(_ladder())


# ---- one arm, in its own process


@dataclass(frozen=True)
class Job:
    """What the process of one arm is asked to do."""

    number: int
    task: ArmTask
    batches: tuple[int, ...]
    context: int
    steps: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        plain = json.loads(text)
        task = ArmTask.from_json(json.dumps(plain.pop("task")))
        return cls(**plain | {"task": task, "batches": tuple(plain["batches"])})


def do_job(text: str) -> dict[str, Any]:
    """What the process of one arm answers."""
    job = Job.from_json(text)
    torch.set_num_threads(job.task.threads)
    return {"batches": measure_arm(job)}


def measure_arm(job: Job) -> dict[str, Figures]:
    """Batch size -> what a decode step of that many requests takes."""
    engine = make_engine(replace(job.task, arm=RUNGS[job.number - 1].engine))
    figures = {}
    for batch in job.batches:
        before = memory_speed(job.task.bandwidth_bytes)
        ids = start_decoding(engine, job, batch)
        figure = timed_steps(engine, batch, job.steps) | profiled_steps(engine)
        engine.abort_request(ids)
        after = memory_speed(job.task.bandwidth_bytes)
        figure["bandwidth"] = {pages: (before[pages] + after[pages]) / 2 for pages in before}
        figure["flops"] = matmul_speed(getattr(torch, job.task.dtype))
        operators = sum(family["ms"] for family in figure["families"].values())
        figure["python_ms"] = max(0.0, figure["step_ms"] - operators)
        figures[str(batch)] = figure
    return figures


def memory_speed(num_bytes: int) -> dict[str, float]:
    """Bytes per second of a plain read, in both kinds of pages."""
    allocators = {"huge": huge_zeros, "ordinary": partial(huge_zeros, huge_pages=False)}
    return {kind: measure_bandwidth("cpu", num_bytes, zeros)["bytes_per_second"] for kind, zeros in allocators.items()}


def matmul_speed(dtype: torch.dtype) -> float:
    """Operations per second of a square product, the best of a few."""
    a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype)  # [MATMUL_SIZE, MATMUL_SIZE]
    seconds = []
    for _ in range(MATMUL_REPEATS):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / min(seconds)


def start_decoding(engine: LLMEngine, job: Job, batch: int) -> list[str]:
    """`batch` requests in mid-decode, warm; over the timed steps their contexts average `job.context`."""
    temperature = RUNGS[job.number - 1].temperature
    params = SamplingParams(
        temperature=temperature,
        top_p=0.95 if temperature else 1.0,
        seed=0,
        max_tokens=WARM_UP + job.steps + PROFILED + batch + 1,  # those who were admitted first are ahead
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    rng = random.Random(batch)
    length = max(1, job.context - job.steps // 2 - WARM_UP)
    ids = [f"{batch}-{i}" for i in range(batch)]
    for request_id in ids:
        prompt = [rng.randrange(3, job.task.vocab_size) for _ in range(length)]
        engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
    engine.step()
    while engine.stats().num_waiting or engine.stats().num_scheduled_tokens != batch:
        engine.step()
    for _ in range(WARM_UP):
        engine.step()
    return ids


def timed_steps(engine: LLMEngine, batch: int, steps: int) -> Figures:
    """Medians of `execute` (forward pass), `sample` (head and sampler), and the rest of `step()`; on a CPU all wait."""
    runner, spent, rows = runner_of(engine), {"execute": 0.0, "sample": 0.0}, []

    def timed(name: str) -> Callable[..., Any]:
        call = getattr(runner, name)

        def wrapper(*args: Any) -> Any:
            start = time.perf_counter()
            result = call(*args)
            spent[name] = (time.perf_counter() - start) * 1e3
            return result

        return wrapper

    with mock.patch.multiple(runner, execute=timed("execute"), sample=timed("sample")):
        for _ in range(steps):
            start = time.perf_counter()
            engine.step()
            step = (time.perf_counter() - start) * 1e3
            assert engine.stats().num_scheduled_tokens == batch, "a decode step has one token of every request"
            rows.append({**spent, "rest": step - sum(spent.values()), "step": step})
    return {f"{name}_ms": statistics.median(row[name] for row in rows) for name in rows[0]}


def profiled_steps(engine: LLMEngine) -> Figures:
    """Milliseconds and operators of a step, by family; after the timed steps, whose times this must not disturb."""
    steps = []
    with spans(runner_of(engine)):
        for _ in range(PROFILED):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                engine.step()
            steps.append(by_family(profiler.events()))
    return dict(median_of(steps))


@contextlib.contextmanager
def spans(runner: model_runner.ModelRunner) -> Iterator[None]:
    """Let the profiler see on whose behalf an operator runs: names alone do not say, both sides multiply and copy."""
    assert isinstance(runner.model, torch.nn.Module)
    targets: list[tuple[Any, str, str]] = [
        (module, "forward", family)
        for module in runner.model.modules()
        for kind, family in SPANS.items()
        if isinstance(module, kind)
    ]
    targets += [(runner.backend, "forward", "attention"), (runner.backend, "prepare", "attention")]
    targets += [(runner.backend, "write", "kv_write"), (runner, "sampler", "sampler")]
    with contextlib.ExitStack() as stack:
        for owner, name, family in targets:
            stack.enter_context(mock.patch.object(owner, name, spanned(getattr(owner, name), family)))
        yield


def spanned(call: Callable[..., Any], family: str) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        with record_function(SPAN + family):
            return call(*args)

    return wrapper


def by_family(events: Iterable[Any]) -> Figures:
    """Operators called from Python (those that they call count as their part), by the innermost span around them."""
    families = {name: {"ms": 0.0, "operators": 0, "calls": 0} for name in FAMILIES}
    in_layers = 0
    for event in events:
        around = list(ancestors(event))  # innermost first
        if event.name.startswith(SPAN):
            families[event.name.removeprefix(SPAN)]["calls"] += 1
        elif "::" in event.name and all(name.startswith(SPAN) for name in around):
            family = around[0].removeprefix(SPAN) if around else "other"
            if family == "layer":
                family = "other"  # views between the modules
            if event.name == ALL_LAYERS:
                family = "layer"
            families[family]["ms"] += event.cpu_time_total / 1e3
            families[family]["operators"] += 1
            in_layers += SPAN + "layer" in around
    operators = sum(family["operators"] for family in families.values())
    return {"families": families, "operators": operators, "operators_in_layers": in_layers}


def ancestors(event: Any) -> Iterator[str]:
    while (event := event.cpu_parent) is not None:
        yield event.name


def runner_of(engine: LLMEngine) -> model_runner.ModelRunner:
    executor = engine.engine_core.executor
    assert isinstance(executor, UniProcExecutor)
    return executor.worker.model_runner
