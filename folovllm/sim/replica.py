"""Replica: one simulated engine of several, with a clock of its own.

Milestone: M10. vLLM counterpart: none. Row 1: no torch.

The core computes a step at once, and the step's outputs count from the moment at which the modelled machine is done.
So a replica has two calls, and the simulation makes the second one when that moment has come:

    end = replica.start_step(now)          # ... other replicas and arrivals until `end` ...
    outputs = replica.take_outputs()
"""

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.outputs import EngineCoreOutput
from folovllm.sim.executor import SimExecutor

MAX_IDLE_STEPS = 1_000  # in a row; a scheduler that computes nothing for so long never will


class Replica:
    """An engine core on a simulated executor, and the step that it is in."""

    def __init__(self, config: EngineConfig, executor: SimExecutor) -> None:
        self.executor = executor
        self.core = EngineCore(config, executor)
        self.kv: list[tuple[float, float]] = []  # per step: share of the blocks held, share of their slots in use
        self._outputs: list[EngineCoreOutput] | None = None  # of the step under way
        self._num_idle_steps = 0

    @property
    def can_start_step(self) -> bool:
        return self._outputs is None and self.core.has_unfinished_requests()

    @property
    def busy_seconds(self) -> float:
        return sum(cost.seconds for cost in self.executor.costs)

    def start_step(self, now: float) -> float:
        """Runs a step that begins at `now`. Returns when it ends. Raises ValueError if the scheduler is stuck."""
        self.executor.now = max(self.executor.now, now)
        num_steps = len(self.executor.costs)
        self._outputs = self.core.step()
        computed = any(cost.flops for cost in self.executor.costs[num_steps:])
        self._num_idle_steps = 0 if computed else self._num_idle_steps + 1
        if self._num_idle_steps > MAX_IDLE_STEPS:
            raise ValueError(f"the scheduler computed nothing in {MAX_IDLE_STEPS} steps, though requests wait")
        stats = self.core.stats()
        filled = stats.num_used_slots / stats.num_reserved_slots if stats.num_reserved_slots else 1.0
        self.kv.append((stats.kv_cache_usage, filled))
        return self.executor.now

    def take_outputs(self) -> list[EngineCoreOutput]:
        """The outputs of the step that has ended."""
        outputs, self._outputs = self._outputs, None
        assert outputs is not None, "no step is under way"
        return outputs
