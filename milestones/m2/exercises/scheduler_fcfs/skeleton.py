"""Exercise m2/scheduler_fcfs: which requests compute in a step, and who leaves. Everything else is inherited."""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    """Owns `self.running`, a list in the order of admission, and `self.waiting`, a queue."""

    def schedule_running(self, step: Step) -> None:
        """Pass 1: gives the running requests the tokens that they lack, in order of admission, while budget is left.

        Each request that gets tokens is recorded with `step.record` and appended to `step.continued`. A request that
        lacks none is passed over. If a request preempted itself (it got None instead of blocks), the pass ends.
        """
        raise NotImplementedError("m2/scheduler_fcfs: schedule_running")

    def schedule_waiting(self, step: Step) -> None:
        """Pass 2: admits requests from the head of the queue while budget, seats and blocks last.

        At most `self.max_num_seqs` requests run. If the head does not fit the budget or the blocks, the pass ends and
        the queue is as it was: no request overtakes the head.
        """
        raise NotImplementedError("m2/scheduler_fcfs: schedule_waiting")

    def retire(self, request: Request) -> None:
        """Takes out a request that has stopped, wherever it is. Its seat and its blocks are free at once.

        If the request was preempted while its last token was on the way, it is in the queue.
        """
        raise NotImplementedError("m2/scheduler_fcfs: retire")
