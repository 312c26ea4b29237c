"""Guards: an exercise keeps its promises. The tests run them for every exercise, and an author for one.

Milestone: M0. vLLM counterpart: none.

    python -m tests.learn_guards m3/block_pool

Each guard returns what is wrong, in sentences; an empty list is good.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

from folovllm.learn.check import OWN_LEVELS, Mine
from folovllm.learn.contract import ContractError, load_work, plain_function, signature_mismatch
from folovllm.learn.exercise import ALL_PARTS, Exercise, find_exercises, get_exercise, spec_line
from folovllm.learn.grade import OK, grade, load_checks, mine_of, run_check
from folovllm.parts import load_class, load_file

MAX_LINES = {"README.md": 60, "skeleton.py": 40}
MIN_MUTANTS = 3
KILLED_BY = re.compile(r"# killed-by: (\w+) \| (.+)")


def reference_passes(exercise: Exercise) -> list[str]:
    """The checks accept the engine's own class. The contract does not, and is left out."""
    checks, mine = load_checks(exercise), _reference_mine(exercise)
    results = [run_check(check, mine, exercise.folder) for check in checks]
    return [f"the reference fails {r.check}: {r.message} {r.where}" for r in results if r.status != OK]


def _reference_mine(exercise: Exercise) -> Mine:
    if exercise.part == ALL_PARTS:
        return Mine(None, {}, None)
    cls = exercise.reference_class
    return Mine(cls, {exercise.part: f"{cls.__module__}:{cls.__qualname__}"}, cls)


def skeleton_fails(exercise: Exercise) -> list[str]:
    """Every check fails on the skeleton, apart from those marked given=True, which pass."""
    cls = load_work(exercise, exercise.skeleton)
    mine = mine_of(exercise, exercise.skeleton, cls)
    problems = []
    for check in load_checks(exercise):
        passed = run_check(check, mine, exercise.skeleton).status == OK
        if passed and not check.given:
            problems.append(f"the skeleton passes {check.name}: the check proves nothing, or wants given=True")
        if check.given and not passed:
            problems.append(f"the skeleton fails {check.name}, which is marked given=True")
    return problems


def mutant_is_killed(exercise: Exercise, mutant: Path) -> list[str]:
    """The check of the mutant's first line fails, with the words that the line gives."""
    header = KILLED_BY.match(mutant.read_text(encoding="utf-8").split("\n", 1)[0])
    if header is None:
        return [f"{mutant.name}: the first line must be `# killed-by: check | words of its message`"]
    name, words = header[1], header[2].strip()
    results = list(grade(exercise, mutant))
    failed = {r.check: r.message for r in results if r.status not in (OK, "skipped")}
    if name not in failed:
        return [f"{mutant.name}: {name} does not fail; failed: {failed or 'nothing'}"]
    if words not in failed[name]:
        return [f"{mutant.name}: the message of {name} lacks {words!r}: {failed[name]}"]
    return []


def files_are_complete(exercise: Exercise) -> list[str]:
    """The files that belong to an exercise are there, and no longer than they should be."""
    names = ["README.md"] if exercise.part == ALL_PARTS else [*MAX_LINES]
    problems = [f"no {name}" for name in (*names, "checks.py") if not (exercise.folder / name).is_file()]
    for name in names:
        path = exercise.folder / name
        lines = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
        if lines > MAX_LINES[name]:
            problems.append(f"{name} has {lines} lines, at most {MAX_LINES[name]} are allowed")
    if exercise.part != ALL_PARTS and len(exercise.mutants) < MIN_MUTANTS:
        problems.append(f"{len(exercise.mutants)} mutants, at least {MIN_MUTANTS} are wanted")
    known = {other.id for other in find_exercises(root=exercise.folder.parents[2])}
    problems += [f"needs {need!r}, which is no exercise" for need in exercise.needs if need not in known]
    return problems


def mutants_are_documented(exercise: Exercise) -> list[str]:
    """Every mutant has a docstring that says where people made the mistake."""
    trees = {mutant.name: ast.parse(mutant.read_text(encoding="utf-8")) for mutant in exercise.mutants}
    return [f"{name}: no docstring" for name, tree in trees.items() if not ast.get_docstring(tree)]


def checks_explain_themselves(exercise: Exercise) -> list[str]:
    """Every assert of checks.py has a message, every check a docstring and a requirement that exists."""
    tree = ast.parse((exercise.folder / "checks.py").read_text(encoding="utf-8"))
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    problems = [f"checks.py, line {node.lineno}: an assert without a message" for node in asserts if node.msg is None]
    for check in load_checks(exercise):
        if not check.doc:
            problems.append(f"{check.name} has no docstring")
        if spec_line(check.spec, exercise.folder.parents[2]) is None:
            problems.append(f"{check.name}: {check.spec!r} is no requirement of a SPEC.md")
        if check.hint not in (1, 2, 3):
            problems.append(f"{check.name}: hint must be 1, 2 or 3")
    return problems


def signatures_agree(exercise: Exercise) -> list[str]:
    """The methods of the skeleton have the parameters of the reference, and docstrings."""
    cls, problems = load_class(f"{exercise.skeleton}:{exercise.class_name}"), []
    for name in exercise.write:
        mine = plain_function(inspect.getattr_static(cls, name))
        reference = plain_function(inspect.getattr_static(exercise.reference_class, name))
        if mismatch := signature_mismatch(mine, reference):
            problems.append(f"{name}: {mismatch}")
        if not mine.__doc__:
            problems.append(f"{name} of the skeleton has no docstring")
        if "return" not in mine.__annotations__:
            problems.append(f"{name} of the skeleton has no annotation of what it returns")
    return problems


def prediction_runs(exercise: Exercise) -> list[str]:
    prediction = getattr(load_file(exercise.folder / "checks.py"), "prediction", None)
    if prediction is None:
        return ["checks.py has no function prediction()"]
    answer = prediction()
    return [] if isinstance(answer, str) and answer else [f"prediction() returned {answer!r}, not a text"]


def re_export_is_refused(exercise: Exercise, scratch: Path) -> list[str]:
    """A file that only imports the engine's class does not pass the contract."""
    cls = exercise.reference_class
    path = scratch / "re_export.py"
    path.write_text(f"from {cls.__module__} import {cls.__qualname__} as {exercise.class_name}\n", encoding="utf-8")
    try:
        load_work(exercise, path)
    except ContractError as error:
        return [] if "grade itself" in str(error) else [f"refused for another reason: {error}"]
    return ["a file that re-exports the reference passes the contract"]


def about_files(exercise: Exercise) -> list[str]:
    """The guards that run nothing of the exercise."""
    guards = [files_are_complete, checks_explain_themselves]
    if exercise.part != ALL_PARTS:
        guards += [mutants_are_documented, signatures_agree]
    return [problem for guard in guards for problem in guard(exercise)]


def guard_all(exercise: Exercise) -> list[str]:
    """All guards, for an author at work."""
    problems = about_files(exercise) + prediction_runs(exercise) + reference_passes(exercise)
    if exercise.part != ALL_PARTS:
        problems += skeleton_fails(exercise)
        problems += [problem for mutant in exercise.mutants for problem in mutant_is_killed(exercise, mutant)]
    return problems


def main() -> None:
    milestone, _, name = sys.argv[1].partition("/")
    exercise = get_exercise(milestone, name)
    problems = guard_all(exercise)
    print(*problems, _seconds(exercise), f"{exercise.id}: {len(problems)} problems", sep="\n")
    sys.exit(bool(problems))


def _seconds(exercise: Exercise) -> str:
    """How long the reference takes, level by level."""
    mine, seconds = _reference_mine(exercise), dict.fromkeys(OWN_LEVELS, 0.0)
    for check in load_checks(exercise):
        result = run_check(check, mine, exercise.folder)
        seconds[check.level] += result.seconds
    return "the reference takes " + ", ".join(f"{level} {value:.2f} s" for level, value in seconds.items())


if __name__ == "__main__":
    main()
