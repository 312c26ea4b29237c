"""The folder work/: one file per exercise, created from the skeletons and never overwritten.

Milestone: M0. vLLM counterpart: none.
"""

import itertools
import tempfile
from pathlib import Path

from folovllm.learn.exercise import ALL_PARTS, Exercise, find_exercises, milestones_dir
from folovllm.learn.files import friendly_os_errors
from folovllm.learn.record import FILE, Record, read_record

WORK = Path("work")
TUTOR = "AGENTS.md"  # rules for a coding assistant that helps in this folder


def find_work(asked: Path | None = None, here: Path | None = None) -> Path:
    """Returns the folder asked for, or ./work. Raises ValueError if there is one above instead, or if it is a file.

    The system's folder for temporary files ends the search, because a learner's files in it have nothing to do with the
    temporary folders of tests and of generated pages below it.
    """
    here = (here or Path.cwd()).resolve()
    shared = Path(tempfile.gettempdir()).resolve()
    work = asked or WORK
    if (here / work).exists() and not (here / work).is_dir():
        raise ValueError(f"{work} is not a folder; rename that file, or choose another folder with --work")
    if asked is None and not (here / WORK).is_dir():
        own = itertools.takewhile(lambda folder: folder != shared, here.parents)
        above = next((folder for folder in own if (folder / WORK / FILE).is_file()), None)
        if above is not None:
            raise ValueError(f"no folder work/ here, but there is one in {above}; run this there: cd {above}")
    return work


def create_files(milestone: str, work: Path) -> list[Exercise]:
    """Creates the files of a milestone that are not there yet. Returns the exercises whose file is new."""
    new = [e for e in find_exercises(milestone) if e.part != ALL_PARTS and not e.work_file(work).exists()]
    with friendly_os_errors():
        for exercise in new:
            path = exercise.work_file(work)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(exercise.skeleton.read_bytes())
        tutor = work / TUTOR
        work.mkdir(parents=True, exist_ok=True)
        if not tutor.exists():
            tutor.write_bytes((milestones_dir() / "tutor.md").read_bytes())
    if new or not (work / FILE).exists():
        record = read_record(work)
        for exercise in new:
            record.add("begin", exercise.id)
    return new


def work_file(exercise: Exercise, work: Path) -> Path:
    """The learner's file. Raises ValueError, with what creates it, if it is not there."""
    path = exercise.work_file(work)
    if path.is_file():
        return path
    elsewhere = "" if work.is_dir() else "; if you have a folder work/ elsewhere, go to where it is"
    raise ValueError(f"no file {path}; `folovllm learn {exercise.milestone}` creates it{elsewhere}")


def reset(exercise: Exercise, record: Record) -> Path:
    """Puts the skeleton in the place of the learner's file. Returns where the file is kept, e.g. block_pool.py.old-1"""
    path = work_file(exercise, record.work)
    number = 1
    while (backup := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    with friendly_os_errors():
        path.rename(backup)
        path.write_bytes(exercise.skeleton.read_bytes())
    record.add("reset", exercise.id, backup=backup.name)
    return backup


def is_untouched(exercise: Exercise, work: Path) -> bool:
    """Whether the learner's file is still the skeleton."""
    path = exercise.work_file(work)
    return path.is_file() and exercise.part != ALL_PARTS and path.read_bytes() == exercise.skeleton.read_bytes()
