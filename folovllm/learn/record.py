"""The learner's record: work/.results.jsonl, one line per check, question for a hint, prediction or look at a solution.

Milestone: M0. vLLM counterpart: none.

Lines are only appended. There is no other state: a file counts as passed if the last check of its present content did.
"""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from folovllm.learn.exercise import Exercise
from folovllm.learn.files import append_record, read_records
from folovllm.learn.grade import FAILED, OK, Result

FILE = ".results.jsonl"


def digest(path: Path) -> str:
    """The hash of a file, which says whether it has changed since it was checked; "" if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


class Named(Protocol):
    """What lines of the record are about: an exercise or a case."""

    @property
    def id(self) -> str: ...


@dataclass
class Record:
    """The lines of work/.results.jsonl. `unreadable` counts those that are none."""

    work: Path
    lines: list[dict[str, Any]]
    unreadable: int = 0

    def of(self, exercise: Named, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("exercise") == exercise.id and line.get("event") == event]

    def add(self, event: str, exercise: str, **values: Any) -> None:
        """Appends a line. Raises ValueError that names the fix if the folder cannot be written."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "event": event, "exercise": exercise, **values}
        append_record(self.work / FILE, line)
        self.lines.append(line)

    def add_results(self, exercise: Exercise, path: Path, results: list[Result]) -> None:
        levels: dict[str, str] = {}
        for result in results:
            if levels.get(result.level, OK) == OK:
                levels[result.level] = result.status
        passed = bool(results) and all(result.status == OK for result in results)
        self.add("check", exercise.id, hash=digest(path), passed=passed, levels=levels)

    # ---- what the lines say

    def state(self, exercise: Exercise) -> str:
        """One of "not begun", "begun", "failing", "changed", "passed" and "assisted" (passed after the solution)."""
        path, checks = exercise.work_file(self.work), self.of(exercise, "check")
        if not path.is_file():
            return "not begun"
        if not checks:
            return "begun"
        last = self.last_check(exercise, digest(path))
        if last is None:
            return "begun" if digest(path) == digest(exercise.skeleton) else "changed"
        if not last.get("passed"):
            return "failing" if FAILED in last.get("levels", {}).values() else "begun"
        return "assisted" if self.is_assisted(exercise, "solution") else "passed"

    def last_check(self, exercise: Named, content: str) -> dict[str, Any] | None:
        """Returns the last check of files with these digests, or None if they were never checked as they are."""
        return next((line for line in reversed(self.of(exercise, "check")) if line.get("hash") == content), None)

    def is_assisted(self, exercise: Named, help_event: str) -> bool:
        """Whether the learner took this help before the first pass. Afterwards it is no help."""
        for line in self.lines:
            if line.get("exercise") == exercise.id and (line.get("event") == help_event or line.get("passed")):
                return line.get("event") == help_event
        return False

    def is_passed(self, exercise: Exercise) -> bool:
        return self.state(exercise) in ("passed", "assisted")


FORM: dict[str, Any] = {
    "time": str, "event": str, "exercise": str, "hash": str, "passed": bool, "levels": dict, "layer": int,
}  # fmt: skip


def _is_event(line: dict[str, Any]) -> bool:
    """Whether a line is one that `Record.add` writes. A file that was edited by hand may hold anything."""
    is_whole = {"time", "event", "exercise"} <= line.keys()
    return is_whole and all(isinstance(line[name], kind) for name, kind in FORM.items() if name in line)


def read_record(work: Path) -> Record:
    """Reads the record; a line that is no event, or a file that is not there, does no harm."""
    lines, num_unreadable = read_records(work / FILE)
    events = [line for line in lines if _is_event(line)]
    return Record(work, events, num_unreadable + len(lines) - len(events))
