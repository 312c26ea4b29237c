"""viz.ask and viz.answer: a question before the experiment, the answer after it, texts in a file."""

from pathlib import Path

import pytest

from folovllm import viz
from folovllm.learn import notebook

pytestmark = pytest.mark.m2

QUESTIONS = """
[[ask]]
id = "90.1"
question = "How many of {seats} seats?"
options = [1, 1000]
because = "Because of <{why}>."

[[ask]]
id = "90.2"
question = "How much faster?"
options = ["less than twice", "twice or more"]
values = [[0, 2], [2, inf]]
because = "It is {computed:.1f} times."

[[ask]]
id = "90.3"
question = "Which is larger?"
options = ["the first", "the second"]
values = [false, true]
because = "It is."

[[ask]]
id = "90.4"
question = "How many?"
because = "Counted."

[[task]]
id = "90.t1"
title = "the queue"
hint = "begin with 1"
ids = true

[[task]]
id = "90.t2"
title = "the word"
hex = true

[delivered]
SEATS = "3"
SIZES = "[1, None]"
"""


@pytest.fixture(autouse=True)
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/questions_90.toml").write_text(QUESTIONS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notebook, "_asked", {})


def both(shown: viz.Shown) -> tuple[str, str]:
    return repr(shown), shown._repr_html_()


def test_a_question_shows_its_options_and_no_answer():
    for text in both(viz.ask("90.1", seats=4)):
        assert "Predict 90.1" in text and "How many of 4 seats?" in text and "Because" not in text
    assert "<li>1,000</li>" in viz.ask("90.1", seats=4)._repr_html_()
    assert "(a number)" in viz.ask("90.4")._repr_html_()


def test_the_answer_names_its_question_and_the_reason():
    viz.ask("90.1", seats=4)
    text, as_html = both(viz.answer("90.1", 1000, why="a rule"))
    assert text == "Answer to 90.1: 1,000. Because of <a rule>."
    assert "How many of 4 seats?" in as_html and "<b>1,000</b>" in as_html and "&lt;a rule&gt;" in as_html


@pytest.mark.parametrize(
    ("identifier", "computed", "said"),
    [
        ("90.2", 1.99, "less than twice. It is 2.0 times."),
        ("90.2", 2, "twice or more. It is 2.0 times."),
        ("90.3", True, "the second. It is."),
        ("90.4", 12, "12. Counted."),
    ],
)
def test_what_was_computed_is_turned_into_an_option(identifier, computed, said):
    assert repr(viz.answer(identifier, computed)) == f"Answer to {identifier}: {said}"


def test_an_answer_that_was_not_offered_is_added_and_said_to_be_new():
    text = repr(viz.answer("90.1", 7, why="x"))
    assert text == f"Answer to 90.1: 7. Because of <x>. ({notebook.NOT_OFFERED})"
    assert notebook.NOT_OFFERED in repr(viz.answer("90.2", -1.0))
    assert notebook.NOT_OFFERED not in repr(viz.answer("90.4", -1))  # a number has no options


@pytest.mark.parametrize(
    ("identifier", "guess", "computed", "verdict"),
    [
        ("90.2", "twice", 5, "right"),
        ("90.2", "less", 5, "not it"),
        ("90.1", 1, 1000, "not it"),
        ("90.1", 1000, 1000, "right"),
        ("90.4", 12, 12, "right"),
        ("90.4", 11, 12, "not it"),
    ],
)
def test_a_guess_is_judged(identifier, guess, computed, verdict):
    viz.ask(identifier, guess=guess, seats=1)
    assert repr(viz.answer(identifier, computed, why="x")).endswith(f" Your guess, {guess}, is {verdict}.")


def test_options_of_the_notebook_replace_those_of_the_file():
    assert "<li>x</li>" in viz.ask("90.1", options=["x", "y"], seats=1)._repr_html_()
    assert notebook.NOT_OFFERED not in repr(viz.answer("90.1", "y", why="x"))


def test_tasks_take_title_and_hint_from_the_file():
    assert repr(viz.your_turn("90.t1", None, [1])) == "Your turn. the queue\nTo do. Hint: begin with 1"
    assert "Entry 0: 4 is not it: another one belongs here." in repr(viz.your_turn("90.t1", [4, 1], [1, 4]))
    assert "returned 0x00000021; expected 0x00000012." in repr(viz.your_turn("90.t2", lambda x: x, [(0x21, 0x12)]))


def test_knobs_that_were_turned_are_named(capsys):
    assert viz.as_delivered("90", {"SEATS": 3, "SIZES": [1, None]}) and not capsys.readouterr().out
    assert not viz.as_delivered("90", {"SEATS": 4, "SIZES": [1, None]})
    assert capsys.readouterr().out == "You have changed SEATS: what this notebook claims is not checked.\n"


@pytest.mark.parametrize(
    ("identifier", "said"),
    [
        ("90.9", "questions_90.toml has no .*90.9; it has 90.1, 90.2"),
        ("91.1", "the questions of notebook 91 are not here"),
        ("seats", 'an id is like "03.4"'),
    ],
)
def test_a_missing_question_says_what_to_do(identifier, said):
    with pytest.raises(ValueError, match=said):
        viz.ask(identifier)


def test_a_name_that_was_not_given_is_named():
    with pytest.raises(ValueError, match=r"the question of 90\.1 needs seats="):
        viz.ask("90.1")


def test_the_questions_of_the_clone_are_found_from_any_folder():
    path = notebook.questions_file("00")
    assert path.is_file() and path.parent.parent.name == "notebooks"
