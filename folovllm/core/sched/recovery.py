"""StepRecovery: what the scheduler does after an exception, so that one failed step costs no other request anything.

Milestone: M1, M9 (several steps in flight). vLLM counterpart: none; there an exception in the engine core ends the
process.

If the executor raised, the scheduler's own state is whole and `fail_step` ends the step. If the exception came from any
other line, bookkeeping may be half done, and `recover` builds it anew from the requests alone. Row 1: no torch.

If other steps were in flight, `recover` is called too: EngineCore._undo_step says why. E.g. S1 {a, b} raises while
S2 {c, d} is in flight. The core drops the answer of S2. If b is blamed, it ends. The queue is then a, c, d, with the
tokens that they had, and all that they have computed is computed again.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.request_queue import RequestQueue
from folovllm.core.sched.step import Step
from folovllm.request import Request, RequestStatus


class StepRecovery(ABC):
    """The half of the Scheduler that ends and undoes steps. The attributes are the Scheduler's."""

    requests: dict[str, Request]
    waiting: RequestQueue
    running: list[Request]
    kv_cache_manager: KVCacheManager
    finished_req_ids: set[str]
    num_prompt_tokens: int
    num_generation_tokens: int
    _step: Step | None  # the latest, until `commit_step`
    _in_flight: list[Step]  # scheduled and not updated, oldest first: several in a pipelined engine

    @abstractmethod
    def _make_kv_cache_manager(self) -> KVCacheManager: ...

    @abstractmethod
    def _make_queue(self) -> RequestQueue: ...

    @abstractmethod
    def _finish(self, finished: list[Request], status: RequestStatus) -> list[Request]: ...

    def fail_step(self, scheduler_output: SchedulerOutput, blamed: Collection[str] | None = None) -> list[Request]:
        """Ends a step in which the executor raised, between `schedule` and `update_from_output`.

        The requests of the step end with FINISHED_ERROR: all of them, or those whose ids are in `blamed`. The others
        of the step wait again, ahead of the queue, with nothing computed. Requests that were not in the step notice
        nothing, and neither does a new request under the id of one that was aborted. Returns the ended ones.

        A request that was preempted while the step was in flight waits already, and keeps its place. Its tokens are
        sent whole again: the worker may have sampled one that the core never saw.
        """
        step = self._take_step(scheduler_output)
        self.kv_cache_manager.end_step(has_run=False)  # what the step published may not have been computed
        in_step = self._unfinished(step.requests)
        failed = [request for request in in_step if blamed is None or request.request_id in blamed]
        self._finish(failed, RequestStatus.FINISHED_ERROR)
        self.finished_req_ids |= step.finished_req_ids  # the worker may not have heard of them
        survivors = self._unfinished(in_step)
        self.running = [request for request in self.running if request not in survivors]
        for request in reversed(survivors):
            is_queued = request.status != RequestStatus.RUNNING
            self.kv_cache_manager.free(request)
            self._rewind(request, request.num_output_tokens)
            if not is_queued:
                self.waiting.prepend_request(request)
        self._step = None
        return failed

    def requests_under_way(self) -> list[Request]:
        """The requests of the step that was interrupted. If `schedule` was, also the one it was looking at."""
        step = self._step or Step(0)
        if step.num_outputs_before is not None:
            return list(step.num_outputs_before)
        in_step = self._unfinished(step.requests)
        if step.output is None:
            in_step += [request for request in [*self.running, *self.waiting] if request not in in_step][:1]
        return in_step

    def recover(self, ended: Iterable[Request], status: RequestStatus) -> None:
        """Builds the state anew after an exception at an unknown line, from the requests alone.

        `ended` leave with `status`. If a step was under way, it is undone: every other request has the outputs that it
        had before, also one that the step had finished. All of them wait with nothing computed, those that ran in
        front. All blocks are free and the prefix cache is empty, since what the blocks hold is unknown. Steps in flight
        are undone too. If `recover` itself is interrupted, it can be called again with the same arguments.
        """
        step = self._step or Step(0)
        before = step.num_outputs_before or {}
        self.requests |= {request.request_id: request for request in before}
        queued = self._unfinished(self.waiting)
        ran = [request for request in dict.fromkeys([*self.running, *self.requests.values()]) if request not in queued]
        ended = self._unfinished(ended)
        survivors = [request for request in self._unfinished([*ran, *queued]) if request not in ended]

        stats = self.kv_cache_manager.prefix_cache_stats
        self.kv_cache_manager, self.waiting, self.running = self._make_kv_cache_manager(), self._make_queue(), []
        self.kv_cache_manager.prefix_cache_stats = stats
        for request in survivors:
            self._rewind(request, before.get(request, request.num_output_tokens))
            self.waiting.add_request(request)
        for request in ended:
            self._rewind(request, request.num_output_tokens)
            request.set_status(status)
        if step.num_outputs_before is not None:
            self.num_prompt_tokens, self.num_generation_tokens = step.counters_before
        for undone in [step, *self._in_flight]:  # the worker may not have heard of them
            self.finished_req_ids |= undone.finished_req_ids
        self.finished_req_ids |= {request.request_id for request in ended}
        self.requests = {request.request_id: request for request in survivors}
        self._step, self._in_flight = None, []

    def commit_step(self) -> None:
        """The caller has what the step gave, so `recover` does not undo it any more."""
        self._step = None

    def _rewind(self, request: Request, num_output_tokens: int) -> None:
        request.rewind(num_output_tokens)
        self.kv_cache_manager.add_request(request)

    def _unfinished(self, requests: Iterable[Request]) -> list[Request]:
        """Those of `requests` that this scheduler still serves: the objects, not others with their ids."""
        return [request for request in requests if self.requests.get(request.request_id) is request]

    def _take_step(self, scheduler_output: SchedulerOutput) -> Step:
        """The record of the step in flight that `scheduler_output` belongs to."""
        for i, step in enumerate(self._in_flight):
            if step.output is scheduler_output:
                return self._in_flight.pop(i)
        # The `schedule` of a subclass keeps no record: the ids have to do.
        known = [self.requests[i] for i in scheduler_output.num_scheduled_tokens if i in self.requests]
        finished = set(scheduler_output.finished_req_ids)
        return Step(0, continued=known, finished_req_ids=finished, output=scheduler_output)
