"""Step: the scheduler's record of one step, from the first decision to the last token.

Milestone: M2. vLLM counterpart: the local variables of vllm/v1/core/sched/scheduler.py#Scheduler.schedule.

Row 1: no torch.
"""

from dataclasses import dataclass, field

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.sched.output import SchedulerOutput
from folovllm.request import Request


@dataclass(eq=False)
class Step:
    """What `schedule` has decided so far in this step, and what it takes to undo the step."""

    token_budget: int
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)  # in scheduling order
    new_blocks: dict[str, list[KVCacheBlock]] = field(default_factory=dict)
    admitted: list[Request] = field(default_factory=list)  # first time
    resumed: list[Request] = field(default_factory=list)  # after a preemption
    continued: list[Request] = field(default_factory=list)  # were running already
    preempted: list[Request] = field(default_factory=list)
    finished_req_ids: set[str] = field(default_factory=set)  # the worker hears of them in this step
    output: SchedulerOutput | None = None  # set as the last act of `schedule`
    # Set when `update_from_output` begins: how many output tokens each request had, and the two token counters.
    num_outputs_before: dict[Request, int] | None = None
    counters_before: tuple[int, int] = (0, 0)

    @property
    def requests(self) -> list[Request]:
        """The scheduled requests themselves. An id may belong to another request by the time the step has run."""
        return [*self.continued, *self.admitted, *self.resumed]

    def record(self, request: Request, num_tokens: int, new_blocks: list[KVCacheBlock]) -> None:
        self.num_scheduled_tokens[request.request_id] = num_tokens
        self.new_blocks[request.request_id] = new_blocks
        self.token_budget -= num_tokens

    def undo(self, request: Request) -> None:
        """Takes back a request scheduled earlier in this step: its tokens return to the budget."""
        if request.request_id in self.num_scheduled_tokens:
            self.token_budget += self.num_scheduled_tokens.pop(request.request_id)
            del self.new_blocks[request.request_id]
            self.continued.remove(request)
