"""simulate: runs a workload on the real scheduler and the real KV cache, with the time of a modelled machine.

Milestone: M5; several engines behind the real router: M10. vLLM counterpart: none. Row 1: no torch.

    metrics = simulate(make_sim_workload("chat"), model="qwen3-8b", gpu="h100", preset="m5")
    metrics = simulate(workload, parts={"core.scheduler": "mine.py:Scheduler"})        # your policy
    metrics = simulate(workload, tensor_parallel_size=4, link="pcie5")                 # four ranks compute each step
    metrics = simulate(workload, data_parallel_size=8, router="random")                # eight engines

What is real: every decision of the router and of the schedulers, every block, every prefix hit and preemption. What is
modelled: how long a step takes (cost.py, links.py), and that all else takes no time.
"""

import enum
import heapq
import traceback
from collections.abc import Iterable, Mapping, Sequence
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
from folovllm.sim.links import LINKS
from folovllm.sim.metrics import SLO, Served, make_metrics
from folovllm.sim.replica import Replica
from folovllm.sim.routing import Routing, make_routing
from folovllm.sim.workloads import SimWorkload
from folovllm.trace.header import make_header
from folovllm.trace.writer import TraceWriter
from folovllm.utils import cdiv, unknown_name_message

DTYPE = "bfloat16"


def simulate(
    workload: SimWorkload, model: str = "qwen3-8b", gpu: str = "h100", *, slo: SLO | None = None,
    trace: str | Path | None = None, **args: Any,
) -> dict[str, Any]:  # fmt: skip
    """Runs `workload` to its end and returns the figures of sim/metrics.py. The other arguments: see make_simulation.

    Raises ValueError for names that do not exist, if the model does not fit, and if the scheduler stops computing.
    """
    simulation = make_simulation(workload, model, gpu, **args)
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
    router: str = "prefix",
    link: str | None = None,
    stage_link: str | None = None,
    preset: str | None = None,
    without: Iterable[str] = (),
    parts: Mapping[str, str] | None = None,
    executor_class: type[SimExecutor] = SimExecutor,
    **engine_args: Any,
) -> "Simulation":
    """A run that has not begun, for callers that also want its executors and its texts.

    `preset`, `without`, `parts` and `engine_args` are those of `LLM`, among them tensor_parallel_size (ranks that are
    connected by `link`), pipeline_parallel_size (stages that are connected by `stage_link`) and data_parallel_size
    (engines behind `router`). By default, the machine's own link connects them.
    """
    if gpu not in HARDWARE:
        raise ValueError(unknown_name_message("machine", gpu, HARDWARE))
    if num_gpus < 1 or not 1 <= weight_bits <= 16:
        raise ValueError(f"num_gpus={num_gpus} and weight_bits={weight_bits}: at least 1, and 1 to 16 bits")
    link = link or HARDWARE[gpu].link
    for name in (link, stage_link or link):
        if name not in LINKS:
            raise ValueError(unknown_name_message("link", name, LINKS))
    arch = shape_architecture(model)
    args = _engine_args(workload, arch, preset, without, engine_args)
    config = EngineConfig.from_args(
        preset=preset, without=without, model=model, parts=dict(parts) if parts else None, **args
    ).resolve(arch, "cpu" if gpu == "cpu" else "cuda")
    cost_model = CostModel(
        arch, HARDWARE[gpu], calibration_of(gpu, config.attention_config.attention_backend == "torch_naive"), num_gpus,
        DTYPE_BYTES[DTYPE], weight_bits, config.parallel_config, LINKS[link], LINKS[stage_link or link],
    )  # fmt: skip
    executors = [executor_class(cost_model) for _ in range(config.parallel_config.data_parallel_size)]
    return Simulation(config, workload, executors, router)


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


class Event(enum.IntEnum):
    """What happens at a moment. Of two events at the same time, the arrival is first."""

    ARRIVAL = 0  # of the request with that index
    STEP_END = 1  # of the replica with that index


class Simulation:
    """One run: events in the order of their times, which are arrivals of requests and ends of steps."""

    def __init__(
        self, config: EngineConfig, workload: SimWorkload, executors: Sequence[SimExecutor], router: str = "prefix"
    ) -> None:
        self.config = config
        self.replicas = [Replica(config, executor) for executor in executors]
        self.routing: Routing = make_routing(router, config, [replica.core for replica in self.replicas])
        self.workload = workload
        self.now = 0.0
        self.events = [(r.arrival, Event.ARRIVAL, i) for i, r in enumerate(workload.requests) if r.follows is None]
        heapq.heapify(self.events)
        self.followers: dict[int, list[int]] = {}
        for i, r in enumerate(workload.requests):
            if r.follows is not None:
                self.followers.setdefault(r.follows, []).append(i)
        self.texts: dict[int, list[int]] = {}
        self.served: dict[str, Served] = {}
        self.requests: dict[str, Request] = {}

    @property
    def executor(self) -> SimExecutor:
        """The first engine's."""
        return self.replicas[0].executor

    @property
    def core(self) -> EngineCore:
        """The first engine's."""
        return self.replicas[0].core

    def write_trace(self, path: str | Path) -> None:
        """Records every step, at the simulated time. Raises ValueError if there are several engines."""
        if len(self.replicas) > 1:
            raise ValueError(f"a trace holds the steps of one engine, and there are {len(self.replicas)}")
        header = make_header(self.config, self.core.kv_cache_config)
        header |= {"machine": {"simulated": self.executor.cost_model.hardware.name}}
        self.core.trace = TraceWriter(path, header, clock=lambda: self.executor.now)

    def run(self, slo: SLO) -> dict[str, Any]:
        try:
            while self.events:
                for index in sorted(self._handle_events()):
                    if self.replicas[index].can_start_step:
                        end = self.replicas[index].start_step(self.now)
                        heapq.heappush(self.events, (end, Event.STEP_END, index))
        except (AssertionError, ValueError):
            raise
        except (Exception, SystemExit) as error:
            if not self.config.parts:
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(
                f"with the parts {', '.join(self.config.parts)} replaced, the run ended in {place.filename}, line "
                f"{place.lineno}: {type(error).__name__}: {error}"
            ) from error
        finally:
            for replica in self.replicas:
                replica.core.shutdown()
        self._check_all_served()
        return self._metrics(slo)

    def _handle_events(self) -> set[int]:
        """Lets everything happen that happens at the next moment. Returns the replicas that it happened to."""
        self.now, touched = self.events[0][0], set[int]()
        while self.events and self.events[0][0] == self.now:
            _, event, index = heapq.heappop(self.events)
            if event is Event.ARRIVAL:
                touched.add(self._add_request(index))
            else:
                self._end_step(index)
                touched.add(index)
        return touched

    def _add_request(self, index: int) -> int:
        """Queues a request at the replica that the router chooses, and returns its index."""
        request, name = self.workload.requests[index], str(index)
        before = [] if request.follows is None else self.texts[request.follows]
        params = SamplingParams(max_tokens=request.output_len, ignore_eos=True)
        made = Request(name, [*before, *request.prompt], params, arrival_time=self.now)
        replica = self.routing.start(made)
        self.replicas[replica].core.add_request(made)
        self.requests[name], self.served[name] = made, Served(self.now, made.num_prompt_tokens)
        return replica

    def _end_step(self, index: int) -> None:
        for output in self.replicas[index].take_outputs():
            self.routing.got_token(output.request_id)
            self.served[output.request_id].token_times += [self.now] * len(output.new_token_ids)
            if output.finished:
                self._finish(output.request_id)

    def _finish(self, name: str) -> None:
        request = self.requests.pop(name)
        self.routing.finish(request)
        self.served[name].num_cached_tokens = max(request.num_cached_tokens, 0)
        self.texts[int(name)] = list(request.all_token_ids)
        for follower in self.followers.get(int(name), ()):
            arrival = self.now + self.workload.requests[follower].arrival
            heapq.heappush(self.events, (arrival, Event.ARRIVAL, follower))

    def _check_all_served(self) -> None:
        """A replaced scheduler may lose a request. Raises ValueError then, since figures would be too good."""
        for index, request in enumerate(self.workload.requests):
            served = self.served.get(str(index))
            if served is None or len(served.token_times) != request.output_len:
                got = len(served.token_times) if served else 0
                raise ValueError(f"request {index} got {got} of {request.output_len} tokens: the scheduler lost it")

    def _metrics(self, slo: SLO) -> dict[str, Any]:
        stats = [replica.core.stats() for replica in self.replicas]
        busy = [replica.busy_seconds for replica in self.replicas]
        return make_metrics(
            list(self.served.values()),
            [cost for replica in self.replicas for cost in replica.executor.costs],
            [shares for replica in self.replicas for shares in replica.kv],
            slo,
            preemptions=sum(one.num_preemptions for one in stats),
            prefix_hit_share=sum(one.prefix_cache_hits for one in stats)
            / max(sum(one.prefix_cache_queries for one in stats), 1),
            busiest_share=max(busy) * len(busy) / sum(busy),
        )
