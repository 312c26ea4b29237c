# killed-by: a_victim_that_stood_earlier_makes_no_request_miss_the_step | passes over one of them
"""Pass 1 walks over the list of running requests itself, from which a preemption removes a request.

Under "fcfs" the victim is the last one and nothing is seen. Under "priority" it may stand earlier: the list shrinks
under the index, and the next request misses the step. vLLM had that under priority scheduling in 2025.
"""

from folovllm.core.sched.scheduler import Scheduler as ReferenceScheduler
from folovllm.core.sched.step import Step
from folovllm.request import Request


class Scheduler(ReferenceScheduler):
    def schedule_running(self, step: Step) -> None:
        for request in self.running:
            if step.token_budget == 0:
                return
            n = self.num_tokens_to_compute(request, request.num_computed_tokens, step.token_budget)
            if n == 0:
                continue
            blocks = self.allocate_or_preempt(request, n, step)
            if blocks is None:
                return
            step.record(request, n, blocks)
            step.continued.append(request)

    def schedule_waiting(self, step: Step) -> None:
        while self.waiting and step.token_budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting.peek_request()
            hits, num_hits = self.kv_cache_manager.get_computed_blocks(request)
            n = self.num_tokens_to_compute(request, num_hits, step.token_budget)
            if n == 0:
                return
            blocks = self.kv_cache_manager.allocate_slots(
                request, n, hits, full_sequence_must_fit=self.reserve_full_sequence, num_new_computed_tokens=num_hits
            )
            if blocks is None:
                return
            self.waiting.pop_request()
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
