"""SimExecutor: an executor that computes nothing, and lets the simulated time pass that the step would take.

Milestone: M5; stages of a pipeline: M10. vLLM counterpart: none. It keeps of each request what the cost of a step
depends on: how many tokens it has. Row 1: no torch.
"""

import zlib
from collections import deque

from folovllm.core.kv_cache_utils import KVCacheConfig
from folovllm.core.sched.output import SchedulerOutput
from folovllm.executor.base import Executor
from folovllm.outputs import ModelRunnerOutput
from folovllm.sim.cost import CostModel, StepCost

WEIGHTS_AND_CACHE = 0.9  # share of the memory; the rest is for activations


class SimExecutor(Executor):
    """Advances `now` (seconds) to the end of every step. The tokens that it returns depend on the request alone.

    A step begins at `now` and passes the stages of the pipeline; each stage takes it when it has finished the step
    before. The core has as many steps under way as there are stages, and `sample` waits for the oldest.
    """

    def __init__(self, cost_model: CostModel) -> None:
        self.cost_model = cost_model
        self.now = 0.0
        self.costs: list[StepCost] = []
        self._stage_free_at = [0.0] * cost_model.parallel.pipeline_parallel_size
        self._ends: deque[float] = deque()  # of the steps under way
        self._num_outputs: dict[str, int] = {}

    def available_kv_cache_bytes(self) -> int:
        """Memory of one rank. Raises ValueError if the weights alone do not fit."""
        model = self.cost_model
        room = WEIGHTS_AND_CACHE * model.memory - model.rank_weight_bytes
        if room <= 0:
            raise ValueError(
                f"the weights take {model.rank_weight_bytes / 1e9:.0f} GB, and {WEIGHTS_AND_CACHE:.0%} of "
                f"{model.num_gpus} x {model.hardware.name} are {WEIGHTS_AND_CACHE * model.memory / 1e9:.0f} GB: take "
                f"more GPUs (tensor_parallel_size, or num_gpus), fewer bits per weight (weight_bits) or a smaller model"
            )
        return int(room)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig) -> None:
        """Nothing is stored."""

    def execute(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        for request_id in scheduler_output.finished_req_ids:
            self._num_outputs.pop(request_id, None)
        work = work_of(scheduler_output).values()
        cost = self.cost_model.step(work, len(scheduler_output.sampling_req_ids))
        self.costs.append(cost)
        end = self.now
        for stage, free_at in enumerate(self._stage_free_at):
            end = self._stage_free_at[stage] = max(end, free_at) + cost.stage_seconds
        self._ends.append(end)
        if len(self._stage_free_at) == 1:
            self.now = end  # nothing else can begin before
        return scheduler_output

    def sample(self, handle: SchedulerOutput) -> ModelRunnerOutput:
        self.now = max(self.now, self._ends.popleft())
        sampled = {
            r: [self._next_token(r)] if r in handle.sampling_req_ids else [] for r in handle.num_scheduled_tokens
        }
        return ModelRunnerOutput(sampled)

    def _next_token(self, request_id: str) -> int:
        count = self._num_outputs[request_id] = self._num_outputs.get(request_id, 0) + 1
        return zlib.crc32(f"{request_id} {count}".encode()) % 30_000


def work_of(scheduler_output: SchedulerOutput) -> dict[str, tuple[int, int]]:
    """What a step computes: request id -> (tokens in the cache, new tokens)."""
    computed = {new.request_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    computed |= {cached.request_id: cached.num_computed_tokens for cached in scheduler_output.scheduled_cached_reqs}
    return {request_id: (computed[request_id], n) for request_id, n in scheduler_output.num_scheduled_tokens.items()}
