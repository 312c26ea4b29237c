"""Replay: the state of the engine as the events of a trace tell it, without any of the engine's code.

Milestone: M2. vLLM counterpart: none.

Row 1: no torch. The replay accepts every event, however absurd, because judging is the task of the lint. It is an
independent second account, so the lint can compare the engine's own account (`table`, `queues`, `pool` of a record)
with it.
"""

from dataclasses import dataclass

from folovllm.trace.record import Event, SchedEntry


@dataclass
class ReplayedRequest:
    """An unfinished request."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    priority: int
    num_tokens: int  # the prompt and what was sampled since
    num_computed_tokens: int = 0

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens


class Replay:
    """`waiting` is in first-come order with preempted requests at the front, and `running` is in the order of
    admission.
    """

    def __init__(self) -> None:
        self.requests: dict[str, ReplayedRequest] = {}
        self.waiting: list[str] = []
        self.running: list[str] = []
        self.tables: dict[str, list[int]] = {}  # request -> blocks, in the order of its tokens
        self.holders: dict[int, list[str]] = {}  # block -> requests
        self.hits: dict[str, int] = {}  # request -> blocks that its current table took from the prefix cache

    def apply(self, event: Event) -> None:
        kind, request_id, *rest = event
        match kind:
            case "add":
                num_prompt_tokens, max_tokens, priority = rest
                self.requests[request_id] = ReplayedRequest(
                    request_id, num_prompt_tokens, max_tokens, priority, num_tokens=num_prompt_tokens
                )
                self.waiting.append(request_id)
            case "preempt" | "requeue":
                self._leave_queues(request_id)
                self.waiting.insert(0, request_id)
                if request_id in self.requests:
                    self.requests[request_id].num_computed_tokens = 0
            case "hit" | "alloc":
                if kind == "hit":
                    self.hits[request_id] = len(rest[0])
                self.take(request_id, rest[0])
            case "free":
                self.release(request_id)
            case "sample":
                if request_id in self.requests:
                    self.requests[request_id].num_tokens += rest[0] if isinstance(rest[0], int) else len(rest[0])
            case "finish":
                self._leave_queues(request_id)
                self.requests.pop(request_id, None)

    def run(self, sched: list[SchedEntry]) -> None:
        """The tokens of the step are computed. A request that was not running yet runs from now on."""
        for entry in sched:
            request_id = entry["req"]
            if request_id not in self.running:
                self._leave_queues(request_id)
                self.running.append(request_id)
            if request_id in self.requests:
                self.requests[request_id].num_computed_tokens = entry["start"] + entry["n"]

    def take(self, request_id: str, blocks: list[int]) -> None:
        """Adds `blocks` to the end of the block table of `request_id`."""
        self.tables.setdefault(request_id, []).extend(blocks)
        for block in blocks:
            self.holders.setdefault(block, []).append(request_id)

    def release(self, request_id: str) -> list[int]:
        """Clears the block table of `request_id` and returns what it held."""
        self.hits.pop(request_id, None)
        table = self.tables.pop(request_id, [])
        for block in table:
            self.holders[block].remove(request_id)
            if not self.holders[block]:
                del self.holders[block]
        return table

    def _leave_queues(self, request_id: str) -> None:
        for queue in (self.waiting, self.running):
            if request_id in queue:
                queue.remove(request_id)
