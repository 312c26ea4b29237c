"""Exercise m5/last_chunk: who samples in a step, and how far each request is computed after it. The rest is
inherited.
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step


class Scheduler(ReferenceScheduler):
    """`self.requests` maps the id of each unfinished request to the request."""

    def choose_sampling(self, step: Step) -> frozenset[str]:
        """Returns the ids of the requests that sample a token in this step. Changes nothing.

        These are the requests of the step whose known tokens, prompt and output, are all computed once it has run. The
        step is not counted in `num_computed_tokens` yet: `advance` is called after this.
        """
        raise NotImplementedError("m5/last_chunk: choose_sampling")

    def advance(self, step: Step) -> None:
        """Counts the tokens of this step, and no others, as computed: `request.num_computed_tokens` grows by them."""
        raise NotImplementedError("m5/last_chunk: advance")
