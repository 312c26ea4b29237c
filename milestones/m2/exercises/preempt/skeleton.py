"""Exercise m2/preempt: who loses its blocks when a running request needs more than are free. The rest is inherited."""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    """Owns `self.running`, a list in the order of admission, and `self.waiting`, a queue."""

    def allocate_or_preempt(self, request: Request, num_new_tokens: int, step: Step) -> list[KVCacheBlock] | None:
        """Returns new blocks for `request`, which runs. Preempts victims, one at a time, until they fit.

        Every victim leaves `self.running` and is appended to `step.preempted`; what this step had granted it is taken
        back with `step.undo`. Returns None if the last victim was `request` itself.
        """
        raise NotImplementedError("m2/preempt: allocate_or_preempt")

    def choose_victim(self) -> Request:
        """Returns the running request that loses its blocks, and changes nothing.

        It is the latest admitted one; if `self.scheduling_policy` is "priority", the one with the largest `sort_key()`.
        """
        raise NotImplementedError("m2/preempt: choose_victim")

    def preempt(self, request: Request) -> None:
        """Frees all blocks of `request`, and puts it back into the queue as a request with nothing computed.

        It keeps its tokens. The caller has taken it out of `self.running`.
        """
        raise NotImplementedError("m2/preempt: preempt")
