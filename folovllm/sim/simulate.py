"""simulate: runs a workload on the real scheduler and the real KV cache, with the time of a modelled machine.

Milestone: M5. vLLM counterpart: none. Row 1: no torch.

    metrics = simulate(make_sim_workload("chat"), model="qwen3-8b", gpu="h100", preset="m5")
    metrics = simulate(workload, parts={"core.scheduler": "mine.py:Scheduler"})        # your policy

What is real: every decision of the scheduler, every block, every prefix hit and preemption. What is modelled: how long
a step takes (cost.py), and that all else takes no time.
"""

import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from folovllm.config import DTYPE_BYTES, EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.hf_config import ModelArchitecture
from folovllm.model_shapes import shape_architecture
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from folovllm.sim.cost import CostModel, calibration_of
from folovllm.sim.executor import SimExecutor
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.metrics import SLO, Served, make_metrics
from folovllm.sim.workloads import SimWorkload
from folovllm.trace.header import make_header
from folovllm.trace.writer import TraceWriter
from folovllm.utils import cdiv, unknown_name_message

MAX_IDLE_STEPS = 1_000  # in a row; a scheduler that computes nothing for so long never will
DTYPE = "bfloat16"


def simulate(
    workload: SimWorkload,
    model: str = "qwen3-8b",
    gpu: str = "h100",
    *,
    num_gpus: int = 1,
    weight_bits: int = 16,
    preset: str | None = None,
    without: Iterable[str] = (),
    parts: Mapping[str, str] | None = None,
    slo: SLO | None = None,
    trace: str | Path | None = None,
    **engine_args: Any,
) -> dict[str, Any]:
    """Runs `workload` to its end and returns the figures of sim/metrics.py.

    `preset`, `without`, `parts` and `engine_args` are those of `LLM`. Raises ValueError for names that do not exist, if
    the model does not fit, and if the scheduler stops computing.
    """
    simulation = make_simulation(
        workload, model, gpu, num_gpus=num_gpus, weight_bits=weight_bits, preset=preset, without=without, parts=parts,
        **engine_args,
    )  # fmt: skip
    if trace is not None:
        simulation.write_trace(trace)
    return simulation.run(slo or SLO())


def make_simulation(
    workload: SimWorkload,
    model: str = "qwen3-8b",
    gpu: str = "h100",
    *,
    num_gpus: int = 1,
    weight_bits: int = 16,
    preset: str | None = None,
    without: Iterable[str] = (),
    parts: Mapping[str, str] | None = None,
    executor_class: type[SimExecutor] = SimExecutor,
    **engine_args: Any,
) -> "Simulation":
    """A run that has not begun, for callers that also want its executor and its texts. Arguments: see `simulate`."""
    if gpu not in HARDWARE:
        raise ValueError(unknown_name_message("machine", gpu, HARDWARE))
    if num_gpus < 1 or not 1 <= weight_bits <= 16:
        raise ValueError(f"num_gpus={num_gpus} and weight_bits={weight_bits}: at least 1, and 1 to 16 bits")
    arch = shape_architecture(model)
    args = _engine_args(workload, arch, preset, without, engine_args)
    config = EngineConfig.from_args(
        preset=preset, without=without, model=model, parts=dict(parts) if parts else None, **args
    ).resolve(arch, "cpu" if gpu == "cpu" else "cuda")
    if config.max_steps_in_flight > 1:
        raise ValueError(
            "the simulator runs one step at a time, so it cannot tell how long a pipeline takes: leave out "
            "pipeline_parallel_size and take num_gpus"
        )
    calibration = calibration_of(gpu, config.attention_config.attention_backend == "torch_naive")
    cost_model = CostModel(arch, HARDWARE[gpu], calibration, num_gpus, DTYPE_BYTES[DTYPE], weight_bits)
    return Simulation(config, workload, executor_class(cost_model))


def _engine_args(
    workload: SimWorkload, arch: ModelArchitecture, preset: str | None, without: Iterable[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Fills in what the workload decides: how long a request may be, and how large its KV cache is."""
    if workload.longest > arch.max_context_len:
        raise ValueError(f"{workload.name} has requests of {workload.longest} tokens, more than the model can hold")
    args = {"dtype": DTYPE, "max_model_len": workload.longest, **given}
    if isinstance(args["max_model_len"], int) and args["max_model_len"] < workload.longest:
        raise ValueError(
            f"max_model_len={args['max_model_len']}: a request has {workload.longest} tokens; leave it out"
        )
    if workload.kv_tokens is not None and not args.keys() & {"num_kv_blocks", "kv_cache_memory"}:
        block_size = EngineConfig.from_args(preset=preset, without=without, **args).cache_config.block_size
        tokens = block_size if isinstance(block_size, int) else int(args["max_model_len"])
        args["num_kv_blocks"] = 1 + cdiv(workload.kv_tokens, tokens)  # 1: the null block
    return args


class Simulation:
    """One run. Time passes in the executor, and jumps to the next arrival when nothing runs."""

    def __init__(self, config: EngineConfig, workload: SimWorkload, executor: SimExecutor) -> None:
        self.executor = executor
        self.core = EngineCore(config, self.executor)
        self.workload = workload
        self.arrivals = {i: r.arrival for i, r in enumerate(workload.requests) if r.follows is None}  # index -> when
        self.texts: dict[int, list[int]] = {}
        self.served: dict[str, Served] = {}
        self.requests: dict[str, Request] = {}
        self.kv: list[tuple[float, float]] = []

    def write_trace(self, path: str | Path) -> None:
        """Records every step, at the simulated time."""
        header = make_header(self.core.config, self.core.kv_cache_config)
        header |= {"machine": {"simulated": self.executor.cost_model.hardware.name}}
        self.core.trace = TraceWriter(path, header, clock=lambda: self.executor.now)

    def run(self, slo: SLO) -> dict[str, Any]:
        idle_steps = 0
        try:
            while self.arrivals or self.core.has_unfinished_requests():
                if not self.core.has_unfinished_requests():
                    self.executor.now = max(self.executor.now, min(self.arrivals.values()))
                self._add_arrivals()
                idle_steps = 0 if self._step() else idle_steps + 1
                if idle_steps > MAX_IDLE_STEPS:
                    raise ValueError(f"the scheduler computed nothing in {MAX_IDLE_STEPS} steps, though requests wait")
        except (AssertionError, ValueError):
            raise
        except (Exception, SystemExit) as error:
            if not self.core.config.parts:
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"with the parts {', '.join(self.core.config.parts)} replaced, the run ended in {place.filename}, line "
                f"{place.lineno}: {type(error).__name__}: {error}"
            ) from error
        finally:
            self.core.shutdown()
        self._check_all_served()
        stats = self.core.stats()
        return make_metrics(
            list(self.served.values()),
            self.executor.costs,
            self.kv,
            slo,
            preemptions=stats.num_preemptions,
            prefix_hit_share=stats.prefix_cache_hits / max(stats.prefix_cache_queries, 1),
        )

    def _check_all_served(self) -> None:
        """A replaced scheduler may lose a request. Raises ValueError then, since figures would be too good."""
        for index, request in enumerate(self.workload.requests):
            served = self.served.get(str(index))
            if served is None or len(served.token_times) != request.output_len:
                got = len(served.token_times) if served else 0
                raise ValueError(f"request {index} got {got} of {request.output_len} tokens: the scheduler lost it")

    def _add_arrivals(self) -> None:
        for arrival, index in sorted((when, i) for i, when in self.arrivals.items() if when <= self.executor.now):
            del self.arrivals[index]
            request, name = self.workload.requests[index], str(index)
            before = [] if request.follows is None else self.texts[request.follows]
            params = SamplingParams(max_tokens=request.output_len, ignore_eos=True)
            made = Request(name, [*before, *request.prompt], params, arrival_time=arrival)
            self.core.add_request(made)
            self.requests[name], self.served[name] = made, Served(arrival, made.num_prompt_tokens)

    def _step(self) -> bool:
        """Runs one step. Returns whether it computed anything."""
        num_steps = len(self.executor.costs)
        outputs = self.core.step()
        for output in outputs:
            self.served[output.request_id].token_times += [self.executor.now] * len(output.new_token_ids)
            if output.finished:
                self._finish(int(output.request_id))
        stats = self.core.stats()
        filled = stats.num_used_slots / stats.num_reserved_slots if stats.num_reserved_slots else 1.0
        self.kv.append((stats.kv_cache_usage, filled))
        return any(cost.flops for cost in self.executor.costs[num_steps:])

    def _finish(self, index: int) -> None:
        self.texts[index] = list(self.requests.pop(str(index)).all_token_ids)
        for follower, request in enumerate(self.workload.requests):
            if request.follows == index:
                self.arrivals[follower] = self.executor.now + request.arrival
