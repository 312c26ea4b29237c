"""What computing a prompt costs on the reference machine in the roofline model: whole, or in chunks beside decodes.

Milestone: M5. vLLM counterpart: none. Pages 05 and 06 print these figures beside measured ones, and the pictures of 05
draw them. Left out: the norms and the sampler.

    roofline().step([(0, 4000)], num_sampled=1).seconds     # one prompt of 4,000 tokens, whole
    modelled(256).itl_p99                                   # ms; the benchmark's long prompts with a budget of 256
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

from folovllm.benchmarks.workloads import NUM_DECODING, long_prompts
from folovllm.learn.exercise import milestones_dir
from folovllm.learn.toy_engine import make_core, make_request
from folovllm.model_shapes import shape_architecture
from folovllm.sim.cost import CALIBRATIONS, Calibration, CostModel, StepCost
from folovllm.sim.executor import SimExecutor
from folovllm.sim.hardware import HARDWARE

MODEL, VOCAB_SIZE = "smollm2-135m", 49_152
NUM_REQUESTS = 12  # 8 readers and 4 long prompts, as in milestones/m5/results
PEAK = Calibration(compute=1.0, overhead=0.0, source="the roofline itself: peak rates, no overhead")


@dataclass(frozen=True)
class CalibratedModel(CostModel):
    """A model whose attention has a rate of its own (FLOP/s), below that of the matrix products."""

    attention_rate: float = 0.0

    def step(self, work: Iterable[tuple[int, int]], num_sampled: int) -> StepCost:
        work = list(work)
        cost = super().step(work, num_sampled)
        products_rate = self.hardware.flops * self.calibration.compute
        longer = attention_flops(work) * (1 / self.attention_rate - 1 / products_rate)
        return replace(cost, compute=cost.compute + longer)


@dataclass(frozen=True)
class BudgetCost:
    """What the users of one budget see; milliseconds, except where it says otherwise."""

    itl_p50: float  # of the eight readers
    itl_p99: float
    ttft: float  # the median of the four long prompts
    tokens_per_second: float
    chunks: list[float]  # the steps that computed the first long prompt


def roofline() -> CostModel:
    """The reference machine, with every operation at its peak rate."""
    return CostModel(shape_architecture(MODEL), HARDWARE["cpu"], PEAK)


def calibrated() -> CalibratedModel:
    """The reference machine with the rates that M4 measured: of its matrix products, of its attention, and per step."""
    calibration = CALIBRATIONS["cpu", "fast"]
    return CalibratedModel(shape_architecture(MODEL), HARDWARE["cpu"], calibration, attention_rate=attention_rate())


def attention_rate(length: int = 4_096) -> float:
    """FLOP/s that the cpu_paged backend reached on a prompt of `length` tokens, without the rest of the model."""
    file = milestones_dir() / "m4/results/bench_attention.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["results"]
    (row,) = (row for row in rows if (row["case"], row["backend"]) == (f"prefill {length}", "cpu_paged"))
    return float(row["gflops_per_s"]) * 1e9


def attention_flops(work: Iterable[tuple[int, int]]) -> float:
    """4 FLOP for each (query, key) pair, number of the head and layer. `work` is (computed, new) per request."""
    arch = shape_architecture(MODEL)
    pairs = sum(new * computed + new * (new + 1) // 2 for computed, new in work)
    return 4.0 * arch.num_hidden_layers * arch.q_size * pairs


def modelled(budget: int | None, cost_model: CostModel | None = None) -> BudgetCost:
    """Runs the workload with `budget` tokens per step; None computes every prompt whole."""
    executor = SimExecutor(cost_model or roofline())
    chunks = {} if budget is None else {"enable_chunked_prefill": True, "max_num_batched_tokens": budget}
    core = make_core(executor, max_model_len=4096, block_size=16, num_kv_blocks=2912, max_num_seqs=64, **chunks)
    load = long_prompts(NUM_REQUESTS, VOCAB_SIZE)
    waiting = dict(enumerate(load))
    arrived: dict[int, float] = {}
    tokens: dict[int, list[float]] = {i: [] for i in waiting}  # when each token came
    chunk_seconds = []
    while waiting or core.has_unfinished_requests():
        clock = len(tokens[0])  # the readers' tokens decide when the next prompt arrives
        for i in [i for i, request in waiting.items() if request.arrival <= clock]:
            request = waiting.pop(i)
            core.add_request(make_request(str(i), request.prompt_token_ids, max_tokens=request.output_len))
            arrived[i] = executor.now
        outputs = core.step()
        if NUM_DECODING in arrived and not tokens[NUM_DECODING]:
            chunk_seconds.append(executor.costs[-1].seconds)
        for output in outputs:
            tokens[int(output.request_id)].append(executor.now)
    gaps = sorted(b - a for i in range(NUM_DECODING) for a, b in zip(tokens[i], tokens[i][1:], strict=False))
    total = sum(len(request.prompt_token_ids) + request.output_len for request in load)
    return BudgetCost(
        itl_p50=1000 * median(gaps),
        itl_p99=1000 * gaps[int(0.99 * len(gaps))],
        ttft=1000 * median(tokens[i][0] - arrived[i] for i in range(NUM_DECODING, NUM_REQUESTS)),
        tokens_per_second=total / executor.now,
        chunks=[1000 * seconds for seconds in chunk_seconds],
    )
