"""The rows of a data set and the folder of results, without Ray: what is a prompt, what is refused, what is kept."""

import contextlib
import inspect
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.data import complete
from folovllm.data.rows import BadRow, Columns, is_conversation, parse_line, row_id, row_params, row_prompt, seed_of

pytestmark = pytest.mark.m10
COLUMNS = Columns()


def latin(line: str) -> str:
    """The line as Ray Data hands it over."""
    return line.encode().decode("latin-1")


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_every_object_on_a_line_is_read_as_it_was_written(row):
    assert parse_line(latin(json.dumps(row, ensure_ascii=False))) == row


def test_a_byte_order_mark_is_dropped():
    assert parse_line(latin('\ufeff{"id": 1}')) == {"id": 1}


@pytest.mark.parametrize("line", ["{", "5", "[1]", "[" * 100_000, "\xff\xfe", ""])
def test_a_line_that_is_no_object_is_a_bad_row(line):
    with pytest.raises(BadRow, match="no JSON"):
        parse_line(line)


@given(st.binary())
def test_no_bytes_end_the_run(data):
    with contextlib.suppress(BadRow):
        parse_line(data.decode("latin-1"))


@pytest.mark.parametrize(
    "value, kind",
    [(None, int), (True, int), ("7", int), (7.0, int), (7, str), (2**63, int), ("\ud800", str), ([], str), ("", str)],
)
def test_an_id_of_another_kind_is_a_bad_row(value, kind):
    with pytest.raises(BadRow, match="column 'id' must hold an id"):
        row_id({"id": value}, COLUMNS, kind)


def test_a_missing_id_is_a_bad_row():
    with pytest.raises(BadRow, match="column 'key'"):
        row_id({"id": 1}, Columns(id="key"), int)


def test_prompts_are_texts_token_ids_and_conversations():
    assert row_prompt({"prompt": "Hello"}, COLUMNS) == "Hello"
    assert not is_conversation(row_prompt({"prompt": [1, 2]}, COLUMNS))
    assert is_conversation(row_prompt({"text": [{"role": "user", "content": "Hi"}]}, Columns(prompt="text")))
    for value in (None, 5, {"prompt": "x"}):
        with pytest.raises(BadRow, match="column 'prompt' must hold text"):
            row_prompt({"prompt": value}, COLUMNS)


def test_the_parameters_of_a_row_go_over_those_of_the_run():
    defaults = {"max_tokens": 5, "temperature": 0.5}
    params = row_params({"sampling_params": {"max_tokens": 7, "temperature": None}}, defaults, 1, seed=0)
    assert (params.max_tokens, params.temperature) == (7, 0.5)
    assert row_params({"sampling_params": {"seed": 3}}, {}, 1, seed=0).seed == 3


@pytest.mark.parametrize("own", [5, {"n": 2}, {"max_token": 5}, {"temperature": -1}])
def test_bad_parameters_are_a_bad_row(own):
    with pytest.raises(ValueError):
        row_params({"sampling_params": own}, {}, 1, seed=0)


def test_a_row_without_a_seed_has_one_that_depends_on_its_id_alone():
    seeds = {row_params({}, {}, identity, seed=0).seed for identity in (1, 2, "1", "2")}
    assert len(seeds) == 4 and row_params({}, {}, 1, seed=0).seed == seed_of(1, 0) != seed_of(1, 1)
    assert all(0 <= seed < 2**63 for seed in seeds if seed is not None)


def test_the_docstring_of_complete_names_every_argument() -> None:
    """preset, without and the columns were missing, and what it returns."""
    signature, text = inspect.signature(complete), inspect.getdoc(complete) or ""
    assert [name for name in signature.parameters if f"`{name}`" not in text] == []
    assert "Returns a Report" in text
