"""Your policy for `folovllm learn m2 race`: which waiting request is admitted next.

`rank` is asked for each waiting request, and the smallest is admitted first. A request has `arrival_time` (seconds),
`num_prompt_tokens`, `num_output_tokens`, `num_preemptions` and `num_computed_tokens`. Its `max_tokens` is the length of
the answer in the race, which no real server knows: a policy that reads it is marked as an oracle.

A class that inherits from `folovllm.core.sched.scheduler.Scheduler` may stand in this file too, or instead. It decides
what every step computes: `schedule_running`, `schedule_waiting`, `num_tokens_to_compute`, `choose_victim`.
"""

from folovllm.learn.race import RankedQueue
from folovllm.request import Request


class Queue(RankedQueue):
    def rank(self, request: Request) -> float:
        """First come, first served. What would serve more requests in time?"""
        return request.arrival_time
