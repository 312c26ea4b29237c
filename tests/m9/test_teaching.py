"""Exercises on classes that are no part of the engine, and milestones whose numbers have two digits."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from folovllm.entrypoints.cli import app
from folovllm.learn.exercise import NO_PART, Exercise, find_exercises, get_exercise, in_order
from folovllm.learn.grade import OK, grade, load_checks
from folovllm.learn.mine import my_parts
from folovllm.learn.pages import page_number
from folovllm.learn.questions import load_questions
from folovllm.learn.record import digest, read_record
from folovllm.milestones import RUNG_IDS

pytestmark = pytest.mark.m9

SOLUTION = """
import dataclasses

from folovllm.hf_config import ModelArchitecture
from folovllm.parallel import ModelShard as _Real


class ModelShard(_Real):
    def layers(self, num_hidden_layers: int) -> range:
        size, rest = divmod(num_hidden_layers, self.pp_size)
        sizes = [size + (self.pp_size - 1 - rest <= stage < self.pp_size - 1) for stage in range(self.pp_size)]
        return range(sum(sizes[: self.pp_rank]), sum(sizes[: self.pp_rank + 1]))

    def num_kv_heads(self, total: int) -> int:
        return total // self.tp_size or 1

    def attention_arch(self, arch: ModelArchitecture) -> ModelArchitecture:
        return dataclasses.replace(
            arch,
            num_attention_heads=arch.num_attention_heads // self.tp_size,
            num_key_value_heads=self.num_kv_heads(arch.num_key_value_heads),
            num_hidden_layers=len(self.layers(arch.num_hidden_layers)),
        )
"""


def test_an_exercise_without_a_part_is_graded_and_left_out_of_mine(tmp_path: Path) -> None:
    """Its own checks are all there are: no engine can be built with the class, so none is compared."""
    exercise = get_exercise("m9", "shards")
    assert exercise.part == NO_PART and not exercise.replaces_a_part and exercise.subject == "ModelShard"
    assert {check.level for check in load_checks(exercise)} == {"unit", "property"}
    path = exercise.work_file(tmp_path)
    path.parent.mkdir()
    path.write_text(SOLUTION, encoding="utf-8")
    results = list(grade(exercise, path))
    assert [result.message for result in results if result.status != OK] == []
    read_record(tmp_path).add("check", exercise.id, hash=digest(path), passed=True)
    with pytest.raises(ValueError, match=r"no exercise in .* has passed, so there is no part of yours"):
        my_parts(tmp_path)


def test_an_exercise_without_a_part_names_its_class(tmp_path: Path) -> None:
    exercise = get_exercise("m9", "shards")
    with pytest.raises(ValueError, match="part 'none' needs a reference"):
        _with_toml(exercise, tmp_path, 'reference = "folovllm.parallel:ModelShard"\n', "")


def _with_toml(exercise: Exercise, folder: Path, old: str, new: str) -> Exercise:
    from folovllm.learn.exercise import load_exercise

    text = (exercise.folder / "exercise.toml").read_text(encoding="utf-8")
    assert old in text
    (folder / "exercise.toml").write_text(text.replace(old, new), encoding="utf-8")
    return load_exercise(folder)


def test_m10_comes_after_m9() -> None:
    """As text, "m10" is smaller than "m2"."""
    order = list(dict.fromkeys(exercise.milestone for exercise in in_order(find_exercises()[::-1])))
    assert order == [rung for rung in RUNG_IDS if rung in order]
    chapters = list(dict.fromkeys(question.chapter for question in load_questions().values()))
    assert chapters[:-2] == [rung for rung in RUNG_IDS if rung in chapters]
    assert [page_number(name) for name in ("m9", "9", "m10", "10", "4b")] == ["09", "09", "10", "10", "04b"]


def test_learn_knows_the_milestones_with_two_digits() -> None:
    result = CliRunner().invoke(app, ["learn", "m10", "bench"])
    assert result.exit_code == 0, result.output
    assert "did you mean 'm10'" in CliRunner().invoke(app, ["learn", "M10"]).output
