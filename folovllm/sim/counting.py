"""What an arm of a bench counts: a simulation whose tokens come from the strict fake model, and its metrics.

Milestone: M2. vLLM counterpart: none. Row 1: no torch.
"""

from collections.abc import Mapping
from typing import Any

from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.fake import FakeExecutor
from folovllm.outputs import ModelRunnerOutput
from folovllm.sim.cost import CostModel
from folovllm.sim.executor import SimExecutor, work_of
from folovllm.sim.replica import Replica
from folovllm.sim.simulate import Simulation

# What a claim may be about: nothing here depends on the speed of the machine that runs the bench.
COUNTERS = {
    "tokens": "the tokens themselves",
    "requests": "requests",
    "known_tokens": "tokens of all texts",
    "steps": "steps that computed something",
    "computed_tokens": "tokens computed",
    "busiest_tokens": "tokens computed by the busiest engine",
    "peak_tokens": "most tokens in a step",
    "budget": "tokens allowed in a step",
    "peak_running": "most requests in a step",
    "longest_wait": "most steps from token to token",
    "preemptions": "preemptions",
    "hit_tokens": "tokens found in the prefix cache",
    "kv_util": "held KV slots in use",
    "kv_capacity": "tokens that fit into the KV cache",
    "kv_bytes": "bytes of K and V per token",
    "weight_bytes": "bytes of all weights",
    "score_entries": "entries of the largest score tensor",
    "flops": "floating-point operations",
    "bytes_read": "bytes read from memory",
}
TIMES = {  # modelled
    "seconds": "seconds",
    "tok_per_s": "output tokens per second",
    "ttft_p50": "TTFT p50, ms",
    "ttft_p99": "TTFT p99, ms",
    "itl_p50": "ITL p50, ms",
    "itl_p99": "ITL p99, ms",
}
METRICS = COUNTERS | TIMES


class CountingExecutor(SimExecutor):
    """Lets modelled time pass, gets its tokens from the strict fake model, and keeps what every step computed."""

    def __init__(self, cost_model: CostModel) -> None:
        super().__init__(cost_model)
        self.model = FakeExecutor()
        self.work: list[dict[str, tuple[int, int]]] = []  # per step: request -> (tokens in the cache, new tokens)
        self.sampling: list[frozenset[str]] = []

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        self.model.initialize_kv_cache(kv_cache_config)

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        if not scheduler_output.is_empty:
            self.work.append(work_of(scheduler_output))
            self.sampling.append(scheduler_output.sampling_req_ids)
        self.model.execute(scheduler_output)
        return super().execute(scheduler_output)

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        super().sample(handle)  # lets the time pass
        return self.model.sample(handle)

    def longest_wait(self) -> int:
        """The largest number of steps from one token of a request to its next."""
        last: dict[str, int] = {}
        longest = 0
        for step, request_ids in enumerate(self.sampling):
            longest = max([longest, *(step - last[request_id] for request_id in request_ids if request_id in last)])
            last |= dict.fromkeys(request_ids, step)
        return longest


def counters_of(simulation: Simulation, figures: Mapping[str, Any], tile: tuple[int, int] | None) -> dict[str, Any]:
    """The values of COUNTERS, after a run. `tile` is (query rows, keys) if attention holds no more scores than that.

    With several engines, work is summed over them, and the largest of a kind is the largest of any.
    """
    executors, config = [counting_executor(replica) for replica in simulation.replicas], simulation.config
    stats = [replica.core.stats() for replica in simulation.replicas]
    works = [work for executor in executors for work in executor.work]
    steps = [[new for _, new in work.values()] for work in works]
    costs = [cost for executor in executors for cost in executor.costs]
    query_rows, key_columns = tile or (2**60, 2**60)
    followed = {request.follows for request in simulation.workload.requests}
    counters = {
        "tokens": tuple(tuple(text) for i, text in sorted(simulation.texts.items()) if i not in followed),
        "requests": len(simulation.workload.requests) - len(followed - {None}),
        "known_tokens": sum(len(text) for i, text in simulation.texts.items() if i not in followed),
        "steps": len(steps),
        "computed_tokens": sum(map(sum, steps)),
        "busiest_tokens": max(sum(sum(new for _, new in w.values()) for w in executor.work) for executor in executors),
        "peak_tokens": max(map(sum, steps)),  # of a step
        "budget": config.max_num_batched_tokens,
        "peak_running": max(map(len, steps)),
        "longest_wait": max(executor.longest_wait() for executor in executors),
        "preemptions": sum(one.num_preemptions for one in stats),
        "hit_tokens": sum(one.prefix_cache_hits for one in stats),
        "kv_util": figures["kv_filled"],  # share of the held slots that hold K and V
        "kv_capacity": (simulation.core.kv_cache_config.num_blocks - 1) * config.block_size,  # tokens; block 0 is null
        "kv_bytes": simulation.core.kv_cache_config.bytes_per_block // config.block_size,  # per token
        "weight_bytes": int(simulation.executor.cost_model.weight_bytes),
        "score_entries": max(  # of the largest score matrix, or tile of it, per head
            min(new, query_rows) * min(old + new, key_columns) for work in works for old, new in work.values()
        ),
        "flops": sum(int(cost.flops) for cost in costs),
        "bytes_read": sum(int(cost.bytes) for cost in costs),
    }
    assert counters.keys() == COUNTERS.keys()
    return counters


def counting_executor(replica: Replica) -> CountingExecutor:
    assert isinstance(replica.executor, CountingExecutor)
    return replica.executor


def times_of(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The values of TIMES."""
    ttft, itl = figures["ttft_ms"], figures["itl_ms"]
    values = (figures["seconds"], figures["output_tok_per_s"], ttft["p50"], ttft["p99"], itl["p50"], itl["p99"])
    return dict(zip(TIMES, values, strict=True))
