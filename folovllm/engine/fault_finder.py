"""FaultFinder: finds the request that makes steps raise, so that it fails alone.

Milestone: M8. vLLM counterpart: none; there an exception in a step ends the engine, and all requests with it.

A step computes many requests at once, so its exception does not say which of them it is about. The core undoes the
step, and all its requests wait again, with the tokens that they have. From then on each of them is a suspect:

    - While there are suspects, requests are admitted one at a time. The next one is admitted when the last has got a
      token, which clears it. A fault that depends on what the request contains comes back with that request.
    - A step that raises while it holds one suspect is a failed trial of that suspect. It moves to the head of the
      queue, so that its next trial is a step without others.
    - A request that fails two trials is guilty. One trial is not enough: a fault may also come by chance.

If other steps were in flight when one raised (M9), the core has undone them too. Their requests are suspects as well,
but the trial is that of the suspect in the step that raised.

Row 1: no torch.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from folovllm.core.sched.output import SchedulerOutput
from folovllm.core.sched.scheduler import Scheduler

MAX_FAILED_TRIALS = 2


class FaultFinder:
    """Controls how many requests the scheduler may run while there are suspects, and judges failed steps."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._max_num_seqs = scheduler.max_num_seqs  # the limit while nothing is wrong
        self._suspects: set[str] = set()
        self._failed_trials: Counter[str] = Counter()
        self._next_trial: str | None = None  # the request on trial if `schedule` itself raises

    @property
    def is_searching(self) -> bool:
        return bool(self._suspects)

    def joined(self, request_id: str) -> None:
        """A new request has joined the queue. During a search it is a suspect like all others."""
        if self._suspects:
            self._suspects.add(request_id)

    def before_step(self) -> None:
        """Limits the next step: one more request may run, unless a suspect that runs has not been cleared yet."""
        if not self._suspects:
            return
        self._suspects &= self._scheduler.requests.keys()  # the others have been aborted
        if not self._suspects:
            self._end_search()
            return
        running = [request.request_id for request in self._scheduler.running]
        on_trial = [request_id for request_id in running if request_id in self._suspects]
        self._scheduler.max_num_seqs = min(self._max_num_seqs, len(running) + (not on_trial))
        waiting = [self._scheduler.waiting.peek_request().request_id] if self._scheduler.waiting else []
        self._next_trial = next(iter([*on_trial, *waiting]), None)

    def step_succeeded(self, got_tokens: Iterable[str]) -> None:
        """Clears the suspects that got a token."""
        if self._suspects:
            self._suspects.difference_update(got_tokens)
            if not self._suspects:
                self._end_search()

    def step_failed(self, scheduled: SchedulerOutput | None) -> str | None:
        """Judges a step that raised, `scheduled`, which the core has undone. Returns the id of the guilty request.

        If `schedule` itself raised, `scheduled` is None.
        """
        in_step: Collection[str] = [self._next_trial or ""] if scheduled is None else scheduled.num_scheduled_tokens
        on_trial = [request_id for request_id in in_step if request_id in self._suspects]
        self._suspects = set(self._scheduler.requests)
        if len(on_trial) != 1 or on_trial[0] not in self._suspects:
            return None
        (request_id,) = on_trial
        self._failed_trials[request_id] += 1
        if self._failed_trials[request_id] >= MAX_FAILED_TRIALS:
            self._suspects.discard(request_id)
            return request_id
        self._move_to_head(request_id)
        return None

    def _move_to_head(self, request_id: str) -> None:
        request = self._scheduler.requests[request_id]
        self._scheduler.waiting.remove_requests([request])
        self._scheduler.waiting.prepend_request(request)

    def _end_search(self) -> None:
        self._scheduler.max_num_seqs = self._max_num_seqs
        self._failed_trials.clear()
        self._next_trial = None
