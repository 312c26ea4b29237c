"""A small milestones/ of its own for tests of the grader: two exercises on the waiting queue, and a capstone.

The folder also has the real SPEC.md, README.md and manifest.toml, which the commands read.
"""

import shutil
from pathlib import Path

from folovllm.learn.exercise import milestones_dir

REAL = milestones_dir()

TOML = """
title = "{title}"
part = "core.request_queue.fcfs"
class = "Queue"
write = {write}
minutes = 10
level = {level}
fast = {fast}
needs = {needs}
spec = ["R2.1"]
predict = "Requests a, b and c are added; which is popped first?"
hints = ["Which end?", "A deque.", "popleft"]
after = "Why is a list slow here?"
"""
CHECKS = '''
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import add_all, drive, make_core, make_request


def filled(mine):
    queue = mine.cls()
    for request_id in "abc":
        queue.add_request(make_request(request_id, prompt=1))
    return queue


def prediction() -> str:
    return "a"


@check("unit", spec="R2.1", hint=1)
def the_first_one_leaves_first(mine: Mine) -> None:
    """The request that waits longest is popped."""
    popped = filled(mine).pop_request().request_id
    assert popped == "a", f"after a, b and c were added, pop_request returned {popped}, expected a"


@check("unit", spec="R2.1", hint=1, given=True)
def the_queue_has_a_length(mine: Mine) -> None:
    """len() counts what waits."""
    assert len(filled(mine)) == 3, "three requests were added"


@check("engine", spec="R2.1", hint=3)
def an_engine_runs_on_it(mine: Mine) -> None:
    """An engine serves its requests in order."""
    core = make_core(max_num_seqs=1, parts=mine.parts)
    add_all(core, [make_request(i, prompt=2, max_tokens=1) for i in "abc"])
    order = list(drive(core))
    assert order == ["a", "b", "c"], f"the engine served {order}"
'''
SECOND_CHECKS = '''
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import make_request


def prediction() -> str:
    return "3"


@check("unit", spec="R2.1")
def a_preempted_request_is_next(mine: Mine) -> None:
    """A preempted request waits ahead of all others."""
    queue = mine.cls()
    for request_id in "ab":
        queue.prepend_request(make_request(request_id, prompt=1))
    first = queue.peek_request().request_id
    assert first == "b", f"b was put in front of a, but {first} is first"


@check("engine", spec="R2.1")
def nothing_more(mine: Mine) -> None:
    """The engine level of this test exercise is empty."""
    mine.cls()
'''
CAPSTONE = """
title = "Your engine"
part = "all"
write = []
minutes = 10
level = 1
needs = ["m2/queue", "m2/preempted"]
spec = ["R2.1"]
predict = "?"
hints = ["a", "b", "c"]
after = "."
"""
CAPSTONE_CHECKS = '''
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import random_workload, run_workload


def prediction() -> str:
    return "?"


@check("engine", spec="R2.1")
def it_serves_a_workload(mine: Mine) -> None:
    """Your engine serves requests."""
    run_workload(random_workload(5, "m2"), parts=mine.parts)
'''
SKELETON = '''"""The waiting queue."""

from folovllm.core.sched.request_queue import FCFSRequestQueue as _Real
from folovllm.request import Request


class Queue(_Real):
'''
METHOD = '''
    def {name}(self{args}) -> {returns}:
        """What {name} does."""
        raise NotImplementedError("m2/{exercise}: {name}")
'''
SOLVED = SKELETON + "\n    def pop_request(self) -> Request:\n        return self._requests.popleft()\n"
SOLVED_SECOND = (
    SKELETON
    + "\n    def prepend_request(self, request: Request) -> None:\n        self._requests.appendleft(request)\n"
)
MUTANT = '# killed-by: {header}\n"""Seen in a test."""\n' + SOLVED
LAST_FIRST = MUTANT.format(header="the_first_one_leaves_first | returned c").replace("popleft", "pop")


def make_milestones(folder: Path) -> Path:
    """Writes the folder and returns it. m2 has the exercises queue and preempted, m7 the capstone your_engine."""
    for rung in ("m2", "m7"):
        (folder / rung).mkdir(parents=True)
        for name in ("SPEC.md", "README.md"):
            shutil.copy(REAL / rung / name, folder / rung / name)
    for name in ("manifest.toml", "tutor.md"):
        shutil.copy(REAL / name, folder / name)
    queue = write_exercise(
        folder, "m2/queue", TOML.format(title="The queue", write='["pop_request"]', level=1, fast="true", needs="[]"),
        CHECKS, SKELETON + METHOD.format(exercise="queue", name="pop_request", args="", returns="Request"),
    )  # fmt: skip
    (queue / "mutants").mkdir()
    for i in range(3):
        (queue / "mutants" / f"last_first_{i}.py").write_text(LAST_FIRST)
    toml = TOML.format(title="In front", write='["prepend_request"]', level=1, fast="false", needs='["m2/queue"]')
    method = METHOD.format(exercise="preempted", name="prepend_request", args=", request: Request", returns="None")
    write_exercise(folder, "m2/preempted", toml, SECOND_CHECKS, SKELETON + method)
    toml = CAPSTONE.replace('"R2.1"', '"R7.1"')
    write_exercise(folder, "m7/your_engine", toml, CAPSTONE_CHECKS.replace("R2.1", "R7.1"), None)
    return folder


def write_exercise(root: Path, exercise_id: str, toml: str, checks: str, skeleton: str | None) -> Path:
    milestone, _, name = exercise_id.partition("/")
    folder = root / milestone / "exercises" / name
    folder.mkdir(parents=True)
    (folder / "exercise.toml").write_text(toml)
    (folder / "checks.py").write_text(checks)
    (folder / "README.md").write_text(f"# {name}\n\nWhat to write.\n")
    if skeleton is not None:
        (folder / "skeleton.py").write_text(skeleton)
    return folder
