"""The lint's rules of prefix caching: what is taken from the cache must have been computed.

Milestone: M6. vLLM counterpart: none. Left out: whether a hit has the right *tokens*. A trace contains no prompts; the
fake executor finds such errors.

Row 1: no torch.
"""

from collections.abc import Callable

from folovllm.trace.record import Event, SchedEntry, StepRecord
from folovllm.utils import cdiv

CACHE_RULES: dict[str, str] = {
    # M6: which cached blocks
    "hit": "a block is hit only when it is full: earlier steps or earlier requests of the step compute all of it",
    "copy": "only a block that earlier steps filled is copied, before it is reused, to its request's first own block",
}


class CacheLinter:
    """Counts how many leading slots of every block are filled. Violations go to `report(rule, message)`."""

    def __init__(self, block_size: int, report: Callable[[str, str], None]) -> None:
        self.block_size = block_size
        self.report = report
        self.filled: dict[int, int] = {}  # block -> slots
        self.hits: dict[str, int] = {}  # request -> hit blocks, of the requests admitted in this step
        self.copies: dict[str, int] = {}  # request -> copied tokens

    def planned(self, events: list[Event]) -> None:
        """Takes what the scheduler decided before the step runs."""
        self.hits, self.copies = {}, {}
        for kind, request_id, *rest in events:
            if kind == "hit":
                self.hits[request_id] = len(rest[0])
            elif kind == "alloc":
                self.filled |= dict.fromkeys(rest[0], 0)
            elif kind == "copy":
                self._check_copy(request_id, *rest)

    def _check_copy(self, request_id: str, source: int, destination: int, num_tokens: int) -> None:
        full = self.filled.get(source, 0)
        if full < self.block_size or not 0 < num_tokens < self.block_size:
            self.report("copy", f"{request_id} copies {num_tokens} tokens of block {source}, which holds {full}")
        self.filled[destination] = num_tokens
        self.copies[request_id] = num_tokens

    def entry(self, entry: SchedEntry) -> None:
        """Takes one request's part of the step, in the order of the batch."""
        size, table, end = self.block_size, entry["table"], entry["start"] + entry["n"]
        num_hits = self.hits.get(entry["req"], 0)
        if empty := [block for block in table[:num_hits] if self.filled.get(block, 0) < size]:
            self.report("hit", f"{entry['req']} hits blocks {empty}, which were never filled")
        if entry["req"] in self.copies and entry["start"] != num_hits * size + self.copies[entry["req"]]:
            self.report("copy", f"{entry['req']} starts at token {entry['start']}, not behind what it copied")
        for i in range(entry["start"] // size, min(cdiv(end, size), len(table))):
            self.filled[table[i]] = min(end - i * size, size)

    def ran(self, record: StepRecord) -> None:
        """The step is over. If it failed, what it should have computed is not there."""
        later = record["events"][record["planned"] :]
        if any(event[0] == "requeue" or (event[0] == "finish" and event[2] == "error") for event in later):
            for entry in record["sched"]:
                for block in entry["table"][entry["start"] // self.block_size :]:
                    self.filled[block] = 0
