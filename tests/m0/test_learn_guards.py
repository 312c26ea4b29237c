"""Every exercise keeps its promises: the reference passes, the skeleton does not, and each mutant is caught by name.

A test of an exercise carries the marker of its milestone. For one exercise: `pytest tests/m0/test_learn_guards.py -k
block_pool`, or, for an author at work, `python -m tests.learn_guards m3/block_pool`.
"""

from pathlib import Path

import pytest

from folovllm.learn.exercise import ALL_PARTS, find_exercises
from tests import learn_guards as guard

EXERCISES = find_exercises()
WRITTEN = [exercise for exercise in EXERCISES if exercise.part != ALL_PARTS]
MUTANTS = [(exercise, mutant) for exercise in WRITTEN for mutant in exercise.mutants]


NONE_YET = [pytest.mark.m0, pytest.mark.skip("no exercises yet")]


def params(exercises):
    found = [pytest.param(e, marks=getattr(pytest.mark, e.milestone), id=e.id) for e in exercises]
    return found or [pytest.param(None, marks=NONE_YET)]


def mutant_params():
    return [
        pytest.param(e, mutant, marks=getattr(pytest.mark, e.milestone), id=f"{e.id}/{mutant.stem}")
        for e, mutant in MUTANTS
    ] or [pytest.param(None, None, marks=NONE_YET)]


@pytest.mark.parametrize("exercise", params(EXERCISES))
def test_the_files_are_complete_and_explain_themselves(exercise):
    assert guard.about_files(exercise) == []


@pytest.mark.parametrize("exercise", params(EXERCISES))
def test_the_prediction_is_computed(exercise):
    assert guard.prediction_runs(exercise) == []


@pytest.mark.parametrize("exercise", params(EXERCISES))
def test_the_reference_passes(exercise):
    assert guard.reference_passes(exercise) == []


@pytest.mark.parametrize("exercise", params(WRITTEN))
def test_the_skeleton_fails_every_check_that_is_not_given(exercise):
    assert guard.skeleton_fails(exercise) == []


@pytest.mark.parametrize("exercise", params(WRITTEN))
def test_a_re_export_of_the_reference_is_refused(exercise, tmp_path: Path):
    assert guard.re_export_is_refused(exercise, tmp_path) == []


@pytest.mark.parametrize(("exercise", "mutant"), mutant_params())
def test_the_mutant_is_killed_by_the_check_that_it_names(exercise, mutant):
    assert guard.mutant_is_killed(exercise, mutant) == []


@pytest.mark.m0
def test_a_milestone_has_at_most_one_exercise_on_the_fast_track():
    fast = [exercise.milestone for exercise in EXERCISES if exercise.fast]
    assert len(fast) == len(set(fast))


@pytest.mark.m0
def test_exercises_on_one_part_write_disjoint_methods() -> None:
    """So that the classes of a learner can become one, with several bases. A later milestone may replace a method."""
    written: dict[tuple[object, str, str], str] = {}
    for exercise in WRITTEN:
        for method in exercise.write:
            key = (exercise.reference_class, exercise.milestone, method)
            assert key not in written, f"{exercise.id} and {written[key]} both write {method} of {exercise.part}"
            written[key] = exercise.id
