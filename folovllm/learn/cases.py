"""Case files: real faults of public engines, each as a report, a recorded trace and the faulty part.

Milestone: M0. vLLM counterpart: none. How a case is graded is in case_grade.py.

A case is a folder milestones/mN/cases/NN_name: case.toml, fault.py (the part with the fault), trace.jsonl (what the
engine did with it), checks.py (what a fix must do) and mutants/ (wrong fixes and a wrong test, which must be refused).
`open_case` copies to work/cases what the learner reads and writes: the answer, the test, the fix and the trace.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from folovllm.learn.exercise import Exercise, milestones_dir, read_fields
from folovllm.learn.files import friendly_os_errors
from folovllm.learn.record import Record, digest
from folovllm.learn.toy_engine import Workload, make_request, steps_of
from folovllm.learn.toy_runner import RUNNER, FlatBatch, ToyRunner, make_engine
from folovllm.parts import PARTS

QUESTIONS = ("step", "cause", "test", "fix")
GRADED = ("answer.toml", "test.py", "fix.py")  # the files that the learner writes
MAX_STEPS = 300  # of a run
MAX_IDLE_STEPS = 5  # in a row, with requests to serve: a faulty engine may wait forever

ANSWER = """\
# Case {number}: {title}
# Read the report (folovllm learn case {number}), then look at the trace:
#   folovllm trace show {trace} --step 0
#   folovllm trace view {trace}

# (a) The first step in which the engine does something else than an engine without the fault: what it schedules, which
# blocks it gives or frees, or what it computes. A trace does not show all of that, and the symptom may come later.
wrong_step = -1

# (b) The root cause: one letter.
{causes}
cause = ""

# (c) The test: {test}.   (d) The fix: {fix}.   Then: folovllm learn case {number} check
"""

TEST = '''\
"""Case {number}, your test. It must fail on the faulty engine, and pass on an engine without the fault.

`parts` is the engine to test: give it to make_engine. The engine arguments below are those of the report; change them,
and the requests, as you like. `generate` runs requests to their end; with `at=[0, 3]`, the second one arrives before
step 3. `alone` is what the model answers a prompt without a cache, a batch or a scheduler. Both are in
folovllm/learn/toy_runner.py. To look at single steps, call `core.add_request(request)` and `core.step()`;
`core.scheduler.waiting` and `core.scheduler.running` are the requests.
"""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine({arguments})
    tokens = generate(core, [make_request("r1", prompt=[5, 9, 2], max_tokens=4)])
    raise NotImplementedError("the test of case {number}")
'''


@dataclass(frozen=True)
class Case:
    """One case.toml and the folder that it is in."""

    folder: Path
    number: int
    title: str
    part: str  # a name of folovllm.parts.PARTS, or "toy.runner"
    class_name: str  # "class" in the file
    write: tuple[str, ...]  # the methods in which the fault is
    minutes: int
    report: str
    source: tuple[str, ...]  # the public reports, "owner/name#number" or "owner/name@commit"
    engine: dict[str, Any]  # arguments of make_engine
    requests: tuple[dict[str, Any], ...]  # arguments of make_request, and `step`: the step before which it arrives
    causes: dict[str, str]
    cause: str  # the right one
    hints: tuple[str, ...]
    lesson: str
    reference: str = ""  # "module:Class"; the default is the part's own
    without_fault: str = ""  # "checks.py:Class": what the faulty class is compared with, if that is not the reference
    crash: bool = False  # the fault raises an error; otherwise it gives a wrong result in silence
    spec: str = ""  # the requirement that the fault breaks
    random: dict[str, Any] = field(default_factory=dict)  # arguments for the random workloads of the fix

    @property
    def workload(self) -> Workload:
        """The run of the report."""
        args = [dict(request) for request in self.requests]
        return Workload(self.engine, tuple((request.pop("step", 0), request) for request in args))

    @property
    def milestone(self) -> str:
        return self.folder.parents[1].name

    @property
    def id(self) -> str:
        """The name in the record. E.g. "case/03"."""
        return f"case/{self.number:02}"

    @property
    def fault(self) -> dict[str, str]:
        """The faulty engine, as the argument `parts` of make_engine."""
        return self.parts_of(self.folder / "fault.py")

    @cached_property
    def good(self) -> dict[str, str]:
        """The engine without the fault."""
        place = self.without_fault.replace("checks.py:", f"{self.folder / 'checks.py'}:") or self.reference
        return {self.part: place} if place else {}

    def is_untouched(self, fix: Path) -> bool:
        return fix.read_bytes() == (self.folder / "fault.py").read_bytes()

    def parts_of(self, path: Path) -> dict[str, str]:
        return {self.part: f"{path}:{self.class_name}"}

    @cached_property
    def exercise(self) -> Exercise:
        """The fix as an exercise: what folovllm.learn.contract and grade need to know of it."""
        default = f"{ToyRunner.__module__}:{ToyRunner.__name__}" if self.part == RUNNER else PARTS[self.part].default
        return Exercise(
            self.folder, self.title, self.part, self.class_name, self.write, self.minutes, 1, (self.spec,), "",
            self.hints, "", self.reference or default,
        )  # fmt: skip

    def file(self, work: Path, name: str) -> Path:
        """A file of the learner's. E.g. work/cases/03_fix.py."""
        return work / "cases" / f"{self.number:02}_{name}"

    def command(self, verb: str) -> str:
        return f"folovllm learn case {self.number} {verb}".rstrip()


# ---- reading


def find_cases(root: Path | None = None) -> list[Case]:
    """Returns all cases by number."""
    paths = (root or milestones_dir()).glob("*/cases/*/case.toml")
    return sorted((load_case(path.parent) for path in paths), key=lambda case: case.number)


def get_case(number: int, root: Path | None = None) -> Case:
    cases = {case.number: case for case in find_cases(root)}
    if number not in cases:
        raise ValueError(f"no case {number}; there are {', '.join(map(str, cases)) or 'none'}")
    return cases[number]


def load_case(folder: Path) -> Case:
    """Reads case.toml. Raises ValueError that names the file and the field for anything wrong in it."""
    case: Case = read_fields(folder / "case.toml", Case, lint)
    return case


def lint(case: Case) -> list[str]:
    """What is wrong with the fields."""
    rules = {
        f"part {case.part!r} is not in folovllm/parts.py": case.part in PARTS or case.part == RUNNER,
        "the folder must begin with the number": case.folder.name.startswith(f"{case.number:02}_"),
        "causes must be four or five, named a, b, c, ...": list(case.causes) in (list("abcd"), list("abcde")),
        "cause must be one of causes": case.cause in case.causes,
        "hints must be two or three": len(case.hints) in (2, 3) and all(case.hints),
        "write must name the methods with the fault": bool(case.class_name and case.write),
        "source must name public reports": bool(case.source)
        and all(re.fullmatch(r"[\w.-]+/[\w.-]+[#@]\w+", source) for source in case.source),
    }
    return [problem for problem, kept in rules.items() if not kept]


# ---- the run of the report


def described(case: Case) -> list[str]:
    """The run of the report in lines: the engine arguments, then the requests."""
    lines = [", ".join(f"{name}={value!r}" for name, value in case.engine.items())]
    for request in case.requests:
        rest = {name: value for name, value in request.items() if name not in ("request_id", "prompt", "step")}
        listed = ", ".join(f"{name}={value!r}" for name, value in rest.items())
        lines.append(f"{request['request_id']}, before step {request.get('step', 0)}: {request['prompt']}, {listed}")
    return lines


@dataclass
class Run:
    """What came out of a run: tokens by request, the exceptions that steps raised, and what it cost."""

    tokens: dict[str, list[int]]
    errors: list[tuple[int, Exception]]
    num_steps: int = 0
    num_computed_tokens: int = 0
    is_done: bool = False
    batches: list[FlatBatch] = field(default_factory=list)


def run_requests(
    parts: Mapping[str, str], workload: Workload, trace: str | None = None, check_integrity: bool = False
) -> Run:
    """Runs requests to their end, past steps that raise. Gives up after MAX_STEPS steps, or MAX_IDLE_STEPS in a row.

    `check_integrity`: a step that leaves blocks and tables at odds counts as one that raised.
    """
    core = make_engine(parts, **workload.config_args, trace=trace)
    arrivals = [(step, make_request(**args)) for step, args in workload.arrivals]
    run, num_idle = Run({request.request_id: [] for _, request in arrivals}, []), 0
    try:
        for step in steps_of(core, arrivals, MAX_STEPS):
            try:
                for output in core.step():
                    run.tokens[output.request_id] += output.new_token_ids
                if check_integrity:
                    core.scheduler.check_integrity()
            except Exception as error:
                run.errors.append((step, error))
            run.num_steps += 1
            computed = core.stats().num_scheduled_tokens
            run.num_computed_tokens += computed
            num_idle = num_idle + 1 if core.has_unfinished_requests() and not computed else 0
            if num_idle == MAX_IDLE_STEPS:
                break
        run.is_done = not core.has_unfinished_requests()
    finally:
        core.shutdown()
    run.batches = getattr(core.executor, "batches", [])
    return run


def record_trace(case: Case, parts: Mapping[str, str], path: Path) -> Run:
    """Runs the case and writes its trace. The header names the part by its file alone."""
    run = run_requests(parts, case.workload, trace=str(path))
    header, *steps = path.read_text(encoding="utf-8").splitlines()
    values = json.loads(header)
    places = values["config"]["parts"] or {}
    values["config"]["parts"] = {name: Path(place).name for name, place in places.items()} or None
    lines = [json.dumps(values, separators=(",", ":")), *steps]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run


# ---- the learner's files


def open_case(case: Case, record: Record) -> list[Path]:
    """Writes the files that are not there yet to work/cases. Returns those."""
    contents = {
        "answer.toml": _answer(case, record.work).encode(),
        "test.py": TEST.format(number=case.number, arguments=_arguments(case)).encode(),
        "fix.py": (case.folder / "fault.py").read_bytes(),
        "trace.jsonl": (case.folder / "trace.jsonl").read_bytes(),
    }
    new = [name for name in contents if not case.file(record.work, name).exists()]
    with friendly_os_errors():
        for name in new:
            path = case.file(record.work, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[name])
    if new:
        record.add("begin", case.id)
    return [case.file(record.work, name) for name in new]


def _answer(case: Case, work: Path) -> str:
    causes = "\n".join(f"#   {letter}) {text}" for letter, text in case.causes.items())
    names = {name.split(".")[0]: case.file(work, name) for name in ("trace.jsonl", "test.py", "fix.py")}
    return ANSWER.format(number=case.number, title=case.title, causes=causes, **names)


def _arguments(case: Case) -> str:
    lines = ["parts", *(f"{name}={value!r}" for name, value in case.engine.items())]
    return "".join(f"\n        {line}," for line in lines) + "\n    "


def next_hint(case: Case, record: Record) -> tuple[int, str]:
    """Returns the number and the text of the next hint. After the last one, it is the last one again."""
    layer = min(len(record.of(case, "hint")), len(case.hints) - 1)
    record.add("hint", case.id, layer=layer + 1)
    return layer + 1, case.hints[layer]


def lesson(case: Case, record: Record) -> tuple[str, list[str]]:
    """What is to be learned, and where the fault was reported. Before the case is solved for the first time: a help."""
    record.add("lesson", case.id)
    return case.lesson, [
        f"https://github.com/{source.replace('#', '/issues/').replace('@', '/commit/')}" for source in case.source
    ]


def add_check(case: Case, record: Record, right: list[str]) -> None:
    """Records which questions were answered rightly."""
    contents = digest_of(case, record.work)
    record.add("check", case.id, hash=contents, right=right, passed=len(right) == len(QUESTIONS))


def state(case: Case, record: Record) -> str:
    """One of "not begun", "begun", "2 of 4", "changed", "solved" and "assisted" (solved after the lesson)."""
    if not case.file(record.work, "answer.toml").is_file():
        return "not begun"
    if not record.of(case, "check"):
        return "begun"
    last = record.last_check(case, digest_of(case, record.work))
    if last is None:
        return "changed"
    if not last.get("passed"):
        return f"{len(last.get('right', []))} of {len(QUESTIONS)}"
    return "assisted" if record.is_assisted(case, "lesson") else "solved"


def digest_of(case: Case, work: Path) -> str:
    """The hashes of the three files that are graded."""
    return "".join(digest(case.file(work, name)) for name in GRADED)
