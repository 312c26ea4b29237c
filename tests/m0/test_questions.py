"""The interview questions: their form, and that what they claim is so (R0.57, R0.58).

Every record is a set of tests with the marker of its milestone, so `pytest -m m3` also proves what the questions on M3
say. Design questions and number drills belong to no rung of the ladder and carry m8.
"""

import ast
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folovllm.learn.mock import plan_mock
from folovllm.learn.questions import LEVELS, Question, load_file, load_questions, question_files
from folovllm.milestones import RUNG_IDS
from folovllm.model_shapes import SHAPES, shape_architecture
from folovllm.sim.hardware import HARDWARE
from tests.m0.test_docs import ROOT, problem_of_anchor

QUESTIONS = load_questions()
FIELDS = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden": "hidden_size",
    "vocab": "vocab_size",
}


def marked(question: Question) -> Any:
    marker = question.chapter if re.fullmatch(r"m\d+", question.chapter) else "m8"
    return pytest.param(question, id=question.id, marks=getattr(pytest.mark, marker))


def each(choose: Callable[[Question], bool] = lambda question: True) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("question", [marked(q) for q in QUESTIONS.values() if choose(q)])


def texts(question: Question) -> list[str]:
    """All English texts of a record as they stand in the file."""
    points = [point.text["en"] for point in question.points]
    fields = (question.q, question.say30, question.say3min, question.trap)
    return [*(text["en"] for text in fields if text), *points]


# ---- what a record claims


@each(lambda question: bool(question.check))
def test_check_runs(question: Question) -> None:
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(question.check))), "a check asserts"
    question.run_check()


@each(lambda question: question.kind in ("number", "predict"))
def test_answer_is_computed_for_every_choice_of_variables(question: Question) -> None:
    """The first choice of each, the last of each, and some drawn ones; all texts can be filled in."""
    rng = random.Random(question.id)
    last = {name: choices[-1] for name, choices in question.vars.items()}
    for values in (question.first_values(), last, *(question.draw_values(rng) for _ in range(5))):
        assert question.answer(values) not in (None, "")
        filled = [question.text(text, values) for text in (question.q, question.say30, question.say3min, question.trap)]
        assert not question.vars or not any(re.search(r"[{}]", text) for text in filled)


@each()
def test_code_and_sources_can_be_opened(question: Question) -> None:
    problems = [f"{anchor}: {problem}" for anchor in question.code if (problem := problem_of_anchor(anchor))]
    problems += [f"{source}: {problem}" for source in question.source if (problem := problem_of_source(source))]
    assert not problems, f"{question.file.name}, {question.id}:\n  " + "\n  ".join(problems)


def problem_of_source(source: str) -> str | None:
    if source.startswith("vllm@"):
        return problem_of_anchor(source)
    if re.fullmatch(r"arxiv:\d{4}\.\d{5}", source) or re.fullmatch(r"https://[\w./#?=&%-]+", source):
        return None
    return problem_of_anchor(source)


@each()
def test_answers_have_the_length_of_speech(question: Question) -> None:
    """About 30 seconds and about 3 minutes at 130 words a minute."""
    words = len(question.say30["en"].split())
    assert 40 <= words <= 100, f"{question.id}: say30 has {words} words"
    if question.say3min:
        words = len(question.say3min["en"].split())
        assert 200 <= words <= 420, f"{question.id}: say3min has {words} words"
    assert len(question.points) >= 3, f"{question.id}: a rubric has at least three points"


# A number that stands for itself: no part of a name (Qwen3-0.6B, bf16, v0.11.0, #46384, M3), a date or a requirement.
NUMBER = re.compile(r"(?<![\w.,#:/-])(\d[\d,]*(?:\.\d+)?)(?![\w-]*[A-Za-z]|[\d/])")
DATE = re.compile(r"\b20[12]\d(?:-\d\d(?:-\d\d)?)?\b|\bRTX \d+|\bLlama[ -]\d(?:\.\d)?|#\d+|arXiv[: ]\S+")
SMALL = 12  # counts of things, as in "two of 3"


def unproved_numbers(question: Question) -> list[str]:
    """Numbers in the texts that do not occur in what the tests run."""
    sources = [question.check, question.compute, question.formula, *question.let.values()]
    proved = {float(n.replace("_", "")) for s in sources for n in re.findall(r"\d[\d_]*(?:\.\d+)?(?:e\d+)?", s)}
    found = [n for text in texts(question) for n in NUMBER.findall(DATE.sub("", re.sub(r"\{[^}]*\}", "", text)))]
    values = [n.rstrip(",").replace(",", "") for n in found]
    return [v for v in values if not (float(v) <= SMALL and float(v).is_integer()) and float(v) not in proved]


@each()
def test_numbers_of_the_text_are_checked(question: Question) -> None:
    missing = unproved_numbers(question)
    assert not missing, f"{question.file.name}, {question.id}: {', '.join(missing)} stand in no check"


# ---- the bank as a whole


@pytest.mark.m0
@pytest.mark.parametrize("file", question_files(), ids=lambda file: str(file.relative_to(ROOT / "milestones")))
def test_files_load_alone(file: Path) -> None:
    assert load_file(file)


@each(lambda question: "model" in question.vars)
def test_shapes_of_models_are_those_of_the_table(question: Question) -> None:
    """folovllm/model_shapes.py holds the published numbers; a record repeats those that its question shows."""
    for model in question.vars["model"]:
        if model["name"].lower() in SHAPES:
            arch = shape_architecture(model["name"].lower())
            wrong = [name for name, field in FIELDS.items() if name in model and model[name] != getattr(arch, field)]
            assert not wrong, f"{model['name']}: {', '.join(wrong)}"
            assert model.get("params", arch.num_parameters()) == pytest.approx(arch.num_parameters(), rel=0.005)


@pytest.mark.m0
def test_hardware_is_what_was_measured() -> None:
    measured = json.loads((ROOT / HARDWARE["cpu"].source).read_text(encoding="utf-8"))
    rates = (
        measured["matmul_flop_per_s"],
        measured["bandwidth"]["bytes_per_second"],
        measured["machine"]["memory_bytes"],
    )
    cpu = HARDWARE["cpu"]
    assert [float(f"{rate:.3g}") for rate in rates] == [cpu.flops, cpu.bandwidth, cpu.memory]
    assert all(machine.source and machine.knee > 1 for machine in HARDWARE.values())


@pytest.mark.m0
@pytest.mark.parametrize(
    ("chapter", "least"), [*((rung_id, 12) for rung_id in RUNG_IDS), ("design", 20), ("drill", 20)]
)
def test_every_chapter_has_enough_questions(chapter: str, least: int) -> None:
    chosen = [question for question in QUESTIONS.values() if question.chapter == chapter]
    assert len(chosen) >= least
    if chapter in RUNG_IDS:
        assert {question.level for question in chosen} == set(LEVELS)
        assert {"number", "explain"} <= {question.kind for question in chosen}


@pytest.mark.m0
def test_every_wrong_public_claim_is_corrected() -> None:
    assert {question.fact for question in QUESTIONS.values() if question.fact} == set(range(1, 15))


@pytest.mark.m0
def test_a_mock_interview_can_be_held() -> None:
    for seed in range(20):
        plan_mock(list(QUESTIONS.values()), 45, random.Random(seed))


# ---- a record that is wrong says where and what to do

GOOD = """
[[q]]
id = "m3-a"
kind = "explain"
level = "core"
tags = ["t"]
q.en = "Why?"
say30.en = "Because."
say3min.en = "Because of that."
points = [{must = true, en = "that"}]
trap.en = "This."
code = ["folovllm/request.py#Request"]
source = ["docs/learn/03_paged_kv_cache.md"]
"""
NUMERIC = GOOD.replace('"explain"', '"number"') + 'vars.n = [1]\nformula = "n + 1"\nunit = "tokens"\n'


def bank(folder: Path, text: str, chapter: str = "m3") -> Path:
    (folder / chapter).mkdir(exist_ok=True)
    (folder / chapter / "questions.toml").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.m0
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("trap.en", "trp.en"), "unknown key 'trp'; did you mean 'trap'"),
        (GOOD.replace('level = "core"', ""), "lacks 'level'"),
        (GOOD.replace('"core"', '"hard"'), "level 'hard' is none of screen, core, deep"),
        (GOOD.replace('"explain"', '"essay"'), "kind 'essay' is none of"),
        (GOOD.replace("m3-a", "kv"), "the id must begin with 'm3-'"),
        (GOOD.replace('q.en = "Why?"', 'q = "Why?"'), "q must have a text per language"),
        (GOOD.replace('q.en = "Why?"', 'q.zh = "Why?"'), "q must be in en and zh"),
        (GOOD.replace("must = true", "must = false"), "at least one point must have"),
        (GOOD.replace('say3min.en = "Because of that."', ""), "lacks 'say3min'"),
        (GOOD.replace('["t"]', "[]"), "tags must not be empty"),
        (GOOD + "fact = 15\n", "fact is the number of a wrong public claim"),
        (GOOD + 'follow = ["m3-b"]\n', "follow names 'm3-b'; did you mean 'm3-a'"),
        (GOOD + GOOD, "has this id, too"),
        (GOOD + 'formula = "1"\n', "a record of kind 'number', and no other"),
        (GOOD.replace('"explain"', '"predict"'), "has a compute"),
        (NUMERIC.replace("vars.n = [1]", ""), "has vars to draw from"),
        (NUMERIC.replace("n + 1", "m + 1"), "the formula fails: NameError"),
        (NUMERIC.replace("n + 1", "n - 1"), "a number that is not 0"),
        ("[[q]\n", "not valid TOML"),
        ("x = 1\n", "must hold [[q]] records"),
    ],
)
def test_a_wrong_record_is_named_with_its_file_and_the_fix(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        load_questions(bank(tmp_path, text))
    assert message in str(raised.value) and "questions.toml" in str(raised.value)
    assert "m3-a" in str(raised.value) or "[[q]" in text[:5] or "x = 1" in text or "kv" in str(raised.value)


@pytest.mark.m0
def test_a_good_record_loads(tmp_path: Path) -> None:
    question = load_questions(bank(tmp_path, GOOD + NUMERIC.replace("m3-a", "m3-n")))["m3-n"]
    assert question.answer({"n": 4}) == 5 and question.chapter == "m3"
    assert question.points[0].must and question.points[0].text == {"en": "that"}


@pytest.mark.m0
def test_numbers_without_a_check_are_found(tmp_path: Path) -> None:
    text = GOOD.replace(
        "Because of that.", "Qwen3-0.6B in bf16 (v0.11.0, #46384, 2026-07-12) needs 114,688 bytes, 1.5 x"
    )
    claimed = load_questions(bank(tmp_path, text))["m3-a"]
    assert unproved_numbers(claimed) == ["114688", "1.5"]
    proved = load_questions(bank(tmp_path, text + "check = 'assert 114_688 / 1.5 > 3'\n"))["m3-a"]
    assert unproved_numbers(proved) == []
