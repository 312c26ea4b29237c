"""viz: the code that a notebook shows, and the tasks that it sets."""

import functools
import sys

import numpy as np
import pytest

from folovllm import viz
from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock

pytestmark = pytest.mark.m2

CASES = [(([7, 2, 9], 20, 16), 36), (([7, 2, 9], 0, 16), 112)]


def slot_of(table: list[int], position: int, block_size: int) -> int:
    return table[position // block_size] * block_size + position % block_size


# ---- source


def test_source_shows_the_code_and_where_it_is():
    shown = viz.source(BlockPool.get_new_blocks)
    lines = repr(shown).splitlines()
    assert lines[0] == "# folovllm/core/block_pool.py, BlockPool.get_new_blocks"
    assert lines[1].startswith("def get_new_blocks(")  # no indentation of the class
    assert lines[-1] == "    return blocks"
    as_html = shown._repr_html_()
    assert "folovllm/core/block_pool.py" in as_html and "get_new_blocks" in as_html and "style=" in as_html


def test_source_of_a_part_says_so():
    text = repr(viz.source(slot_of, start="return"))
    assert text.splitlines()[0] == "# slot_of, in part" and text.splitlines()[1].startswith("return table[")
    lines = repr(viz.source(BlockPool.get_new_blocks, "blocks =", "return")).splitlines()
    assert lines[1].startswith("blocks = ") and lines[-1] == "return blocks"


@pytest.mark.parametrize("obj", [KVCacheBlock, BlockPool.usage, slot_of], ids=["class", "property", "not the engine's"])
def test_source_of_other_things(obj):
    text = repr(viz.source(obj))
    assert "def usage" in text or "class KVCacheBlock" in text or "def slot_of" in text
    assert str(viz.ROOT) not in text + viz.source(obj)._repr_html_()  # no folder of this machine


def test_source_without_pygments_is_plain_but_whole(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygments", None)
    as_html = viz.source(BlockPool.usage)._repr_html_()
    assert "-&gt; float" in as_html and "<span" not in as_html


# ---- your_turn


def said(answer, expected, hint="count from 0"):
    return repr(viz.your_turn("slots", answer, expected, hint))


def test_a_task_not_begun_is_no_error():
    def undone(*args):
        raise NotImplementedError

    for answer, expected in ((None, 3), (lambda *args: None, CASES), (undone, CASES)):
        text = said(answer, expected)
        assert text == "Your turn. slots\nTo do. Hint: count from 0"
    assert "count from 0" in viz.your_turn("slots", None, 3, "count from 0")._repr_html_()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (36, 36),
        (0.1 + 0.2, 0.3),
        (3, 3.0),
        (0.0, 1e-9),
        (float("nan"), float("nan")),
        (np.int64(5), 5),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ((4, 21), [4, 21]),
        ({"a": [1, 2]}, {"a": (1, 2)}),
        ("a", "a"),
        (False, False),
        ({1, 2}, {2, 1}),
        (slot_of, CASES),
        (lambda x: [x], [(1, [1]), (2, [2])]),
    ],
)
def test_right_answers_pass(answer, expected):
    text = said(answer, expected)
    assert text.startswith("Your turn. slots\nPassed.") and "Hint" not in text


@pytest.mark.parametrize(
    ("answer", "expected", "why"),
    [
        (35, 36, "35 is too small."),
        (0.31, 0.3, "0.31 is too large."),
        (0, 1e-5, "0 is too small."),
        (True, 1, "True is not it."),
        ("36", 36, "'36' is not it."),
        ([4, 20], [4, 21], "Entry 1: 20 is too small."),
        ([4], [4, 21], "Its length is 1; expected 2."),
        (4, [4, 21], "4 is not a list."),
        (np.array([1.0, 2.0]), [1.0, 3.0], "Entry 1: 2 is too small."),
        ({"a": 1}, {"b": 1}, "The keys are ['a']; one of them is wrong or missing."),
        ({"a": 1}, {"a": 2}, "The value of 'a' is 1, which is not it."),
        (float("nan"), 1.0, "nan is not it."),
        (2 / 3, 1.5, "0.6667 is too small."),
        (2.6, 3, "2.6 would be right after rounding: the answer is a whole number."),
    ],
)
def test_wrong_answers_are_told_what_differs_and_not_the_answer(answer, expected, why):
    assert said(answer, expected) == f"Your turn. slots\nNot yet. {why} Hint: count from 0"


def test_a_function_is_shown_its_first_failing_case():
    def wrong(table, position, block_size):
        table.clear()  # a case must not see what the case before did to its arguments
        return 112

    cases = [CASES[1], CASES[0]]
    text = said(wrong, cases)
    assert "wrong([7, 2, 9], 20, 16) returned 112; expected 36." in text
    assert cases == [CASES[1], CASES[0]] and cases[0][0][0] == [7, 2, 9]


def test_a_forgotten_return_is_not_a_task_undone():
    def forgotten(table, position, block_size):
        slot_of(table, position, block_size)

    def documented(table, position, block_size):
        """Only a docstring."""

    assert "forgotten([7, 2, 9], 20, 16) returned None: is the return missing?" in said(forgotten, CASES)
    assert "\nTo do." in said(documented, CASES)


def test_a_wrapped_function_is_not_begun_if_the_readers_is_not():
    def mine(table, position, block_size):
        return None

    @functools.wraps(mine)
    def rounded(*args):
        return mine(*args)

    assert "\nTo do." in said(rounded, CASES)


def test_long_arguments_are_cut():
    assert len(said(lambda x: 0, [(list(range(1000)), 1)])) < 500


def test_an_exception_of_the_readers_function_is_shown():
    def broken(table, position, block_size):
        return table[position]

    assert "broken([7, 2, 9], 20, 16) raised IndexError: list index out of range" in said(broken, CASES)
    as_html = viz.your_turn("<b>", lambda x: 1 / x, [(0, 1)])._repr_html_()
    assert "ZeroDivisionError" in as_html and "&lt;b&gt;" in as_html


# ---- tables


def test_a_table_shows_no_digits_that_say_nothing():
    rows = [["x", 1234567, 34.6, 2.0, 0.125], ["y", 8, 8.0, 3.0, 0.5]]
    lines = repr(viz.table(["", "bytes", "GB/s", "times", "share"], rows)).splitlines()
    assert lines[1].split() == ["x", "1,234,567", "34.6", "2", "0.12"]
    assert lines[2].split() == ["y", "8", "8.0", "3", "0.50"]
    assert [len(line) for line in lines[1:]] == [len(lines[0])] * 2  # numbers are aligned right
