# killed-by: no_request_overtakes_a_head_that_exceeds_the_budget | makes b wait forever
"""A head of the queue that does not fit is skipped, and a smaller request behind it runs.

Throughput rises, and the large request waits as long as small ones keep coming. Head-of-line blocking is the price of
no starvation, which vLLM's V1 scheduler pays as well.
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request, RequestStatus


class Scheduler(ReferenceScheduler):
    def schedule_running(self, step: Step) -> None:
        for request in list(self.running):
            if step.token_budget == 0:
                return
            if request.status != RequestStatus.RUNNING:
                continue
            n = self.num_tokens_to_compute(request, request.num_computed_tokens, step.token_budget)
            if n == 0:
                continue
            blocks = self.allocate_or_preempt(request, n, step)
            if blocks is None:
                return
            step.record(request, n, blocks)
            step.continued.append(request)

    def schedule_waiting(self, step: Step) -> None:
        for request in list(self.waiting):
            if step.token_budget == 0 or len(self.running) >= self.max_num_seqs:
                return
            hits, num_hits = self.kv_cache_manager.get_computed_blocks(request)
            n = self.num_tokens_to_compute(request, num_hits, step.token_budget)
            if n == 0:
                continue
            blocks = self.kv_cache_manager.allocate_slots(
                request, n, hits, full_sequence_must_fit=self.reserve_full_sequence, num_new_computed_tokens=num_hits
            )
            if blocks is None:
                continue
            self.waiting.remove_requests([request])
            self.admit(request, num_hits, step)
            step.record(request, n, blocks)

    def retire(self, request: Request) -> None:
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove_requests([request])
        self.kv_cache_manager.free(request)
        self.finished_req_ids.add(request.request_id)
        del self.requests[request.request_id]
