"""StepsInFlight: what the scheduler must know to start a step while earlier ones still run.

Milestone: M9. vLLM counterpart: `EngineCore.step_with_batch_queue` in vllm/v1/engine/core.py, which keeps the queue.
Left out: asynchronous scheduling, where a request is scheduled again before its token is known.

Row 1: no torch. A step passes the stages of a pipeline one after another. If the engine waited for its answer before
it started the next step, all stages but one would be idle. So it keeps as many steps in flight as there are stages.
E.g. four requests that decode, two stages:

    call of EngineCore.step     starts                      stage 0 runs   stage 1 runs   takes the answer of
    1                           S1 {a, b}, S2 {c, d}        S1, then S2    S1             S1: tokens for a and b
    2                           S3 {a, b}                   S3             S2             S2: tokens for c and d
    3                           S4 {c, d}                   S4             S3             S3

Four rules make this right:

1. A request whose next token is on its way is passed over, because that token is the input of its next step. No code
   is needed for it: `num_computed_tokens` is advanced when the step starts, so the request lacks no known token. A
   request in mid-prompt does lack some, and the next part of its prompt may follow in the next step: each stage runs
   the steps in order, so it finds the K/V of the first part when it computes the second.
2. A step takes only its share of the requests (`share_of_step`). If S1 had taken all four, S2 would have been empty.
3. A request that was preempted while a step of it was in flight is admitted again only when that step has ended
   (`is_in_flight`). Otherwise it would be sampled twice: S1 computes a's tokens 0..9 and samples token 10. Before that
   answer is there, a is preempted. If S3 admitted a with the 10 known tokens, S3 would sample token 10 as well.
4. The answer of a step belongs to the requests that were in it when it started, preempted or not. A token is a function
   of the tokens before it, so the token that a preempted request gets late is the one that it would have got later.
"""

from abc import ABC

from folovllm.core.sched.request_queue import RequestQueue
from folovllm.core.sched.step import Step
from folovllm.request import Request
from folovllm.utils import cdiv


class StepsInFlight(ABC):
    """The part of the Scheduler that looks at the steps in flight. The attributes are the Scheduler's."""

    running: list[Request]
    waiting: RequestQueue
    batching: str
    max_num_seqs: int
    max_steps_in_flight: int
    _in_flight: list[Step]  # scheduled and not updated, oldest first

    def share_of_step(self, num_requests: int) -> int:
        """How many of `num_requests` requests one step takes, so that there are requests for the other stages.

        E.g. 2 stages: of 5 requests 3, and the next step takes the other 2. With one stage it is all of them.
        """
        return cdiv(num_requests, self.max_steps_in_flight)

    def is_in_flight(self, request: Request) -> bool:
        """Whether a step with that id is in flight. (If the id was aborted and came back, that step is waited for.)"""
        return any(request.request_id in step.num_scheduled_tokens for step in self._in_flight)

    def awaits_token(self, request: Request) -> bool:
        """Whether a step in flight samples for `request`."""
        outputs = (step.output for step in self._in_flight)
        return any(output is not None and request.request_id in output.sampling_req_ids for output in outputs)

    def can_start_step(self) -> bool:
        """Whether one more step could compute something now. It does not look for free blocks, so it may be wrong."""
        if any(request.num_computed_tokens < request.num_tokens for request in self.running):
            return True
        if not self.waiting or len(self.running) >= self.max_num_seqs or (self.running and self.batching == "static"):
            return False
        return not self.is_in_flight(self.waiting.peek_request())
