"""SamplingParams: vLLM's fields, defaults and ranges; whatever is wrong is refused by a ValueError that names it."""

import dataclasses
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.sampling_params import MIN_RANDOM_TEMPERATURE, RequestOutputKind, SamplingParams

pytestmark = pytest.mark.m0

VLLM_DEFAULTS: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": None,
    "stop_token_ids": None,
    "bad_words": None,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "logit_bias": None,
    "allowed_token_ids": None,
}
OWN_DEFAULTS: dict[str, Any] = {}  # of the fields that vLLM lacks
FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]
NAN, INF = math.nan, math.inf

# Field -> the values at its edges that are right, and those just beyond that are not.
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 100], [0, -1]),
    "presence_penalty": ([-2, -2.0, 0, 2.0], [-2.001, 2.001, NAN, INF]),
    "frequency_penalty": ([-2, -2.0, 0, 2.0], [-2.001, 2.001, NAN, -INF]),
    "repetition_penalty": ([1e-9, 1, 50.0], [0, 0.0, -1.0, NAN, INF]),
    "temperature": ([0, 0.0, 0.5, 2.5, 1e9], [-0.001, NAN, INF, 10**400]),
    "top_p": ([1e-9, 0.5, 1, 1.0], [0, 0.0, -0.1, 1.0001, NAN]),
    "top_k": ([-1, 0, 1, 10**9], [-2]),
    "min_p": ([0, 0.0, 0.5, 1, 1.0], [-0.001, 1.001, NAN]),
    "seed": ([None, 0, -5, -(2**63), 2**63 - 1], [-(2**63) - 1, 2**63]),
    "max_tokens": ([None, 1, 10**9], [0, -1]),
    "min_tokens": ([0, 1, 16], [-1]),
    "logprobs": ([None, -1, 0, 10**6], [-2]),
    "prompt_logprobs": ([None, -1, 0, 10**6], [-2]),
    "stop": ([None, "x", ["x", "yy"], []], ["", [""], ["x", ""], [None], [5]]),
    "stop_token_ids": ([None, [], [0, 7]], [[-1], ["7"], [True], [1.0]]),
    "bad_words": ([None, [], ["a b"]], [[""], [5]]),
    "allowed_token_ids": ([None, [0], [5, 5]], [[], [-1], ["5"], [True]]),
    "logit_bias": ([None, {}, {0: -100, 7: 100.0}], [{0: 100.1}, {0: NAN}, {-1: 1.0}, {"5": 1.0}, {5: "1"}, {True: 1}]),
    "output_kind": (list(RequestOutputKind), [None, 0, "CUMULATIVE"]),
    **{
        name: ([True, False], [None, 0, 1, "yes"])
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        )
    },
}
TYPES = {field.name: field.type for field in dataclasses.fields(SamplingParams)}
INTEGERS = [name for name in FIELDS if TYPES[name] in (int, int | None)]
NUMBERS = [name for name in FIELDS if TYPES[name] is float]
LISTS = ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")


def cases(which: int) -> list[tuple[str, Any]]:
    return [(name, value) for name, both in RANGES.items() for value in both[which]]


# ---- values


def test_fields_and_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert {name: getattr(params, name) for name in FIELDS} == VLLM_DEFAULTS | OWN_DEFAULTS


def test_every_field_has_a_range() -> None:
    assert set(RANGES) == set(FIELDS)


@pytest.mark.parametrize(("name", "value"), cases(0))
def test_the_edges_of_a_range_are_right(name: str, value: Any) -> None:
    kept = getattr(SamplingParams(**{name: value}), name)
    assert kept == ([value] if isinstance(value, str) else value)


@pytest.mark.parametrize(("name", "value"), cases(1))
def test_beyond_the_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", ["3", 3.0, True, [3]])
def test_integers_are_integers(name: str, value: Any) -> None:
    hint = "; write 3" if value in ("3", 3.0) else ""
    with pytest.raises(ValueError, match=re.escape(f"{name} must be an integer, got {value!r}{hint}")):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["0.5", True, None, [0.5]])
def test_numbers_are_numbers(name: str, value: Any) -> None:
    hint = "; write 0.5" if value == "0.5" else ""
    with pytest.raises(ValueError, match=re.escape(f"{name} must be a finite number, got {value!r}{hint}")):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("value", [5, {"a": 1}, b"x", 0.5])
def test_lists_are_lists(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a list, got {type(value).__name__}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens \(9\) must not exceed max_tokens \(8\)"),
        ({"min_tokens": 17}, r"min_tokens \(17\) must not exceed max_tokens \(16\)"),
        ({"n": 2, "temperature": 0}, "n must be 1 with greedy sampling"),
        ({"n": 2, "temperature": None}, "temperature must be"),
        ({"n": 2, "temperature": 1e-6}, "n must be 1 with greedy sampling"),
        ({"stop": "x", "detokenize": False}, "set detokenize=True, or stop on stop_token_ids"),
    ],
)
def test_values_that_do_not_go_together(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


def test_values_that_do_go_together() -> None:
    assert SamplingParams(min_tokens=8, max_tokens=8).min_tokens == 8
    assert SamplingParams(min_tokens=99, max_tokens=None).max_tokens is None
    assert SamplingParams(n=1, temperature=0).is_greedy
    assert SamplingParams(stop=[], detokenize=False).stop_strings == []


# ---- what is made of them


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("stop", "end", ["end"]),
        ("stop", ("a", "b"), ["a", "b"]),
        ("stop_token_ids", (1, 2), [1, 2]),
        ("bad_words", frozenset({"no"}), ["no"]),
        ("allowed_token_ids", {7}, [7]),
    ],
)
def test_one_string_and_other_collections_become_lists(name: str, given: Any, kept: list[Any]) -> None:
    assert getattr(SamplingParams(**{name: given}), name) == kept


def test_stop_strings() -> None:
    assert SamplingParams().stop_strings == []
    assert SamplingParams(stop="x").stop_strings == ["x"]


def test_seed_minus_one_is_no_seed() -> None:
    assert SamplingParams(seed=-1).seed is None


@pytest.mark.parametrize(
    ("given", "kept", "greedy"),
    [
        (0, 0, True),
        (9e-6, 9e-6, True),
        (1e-5, MIN_RANDOM_TEMPERATURE, False),
        (0.005, MIN_RANDOM_TEMPERATURE, False),
        (0.01, 0.01, False),
        (0.7, 0.7, False),
    ],
)
def test_tiny_temperatures_are_greedy_or_raised(given: float, kept: float, greedy: bool) -> None:
    params = SamplingParams(temperature=given)
    assert (params.temperature, params.is_greedy) == (kept, greedy)


def test_later_changes_of_what_was_passed_change_nothing() -> None:
    stop, bias, ids = ["x"], {5: 1.0}, [1]
    params = SamplingParams(stop=stop, logit_bias=bias, stop_token_ids=ids)
    stop.append("")
    bias[-1] = 1000.0
    ids[0] = -5
    assert (params.stop, params.logit_bias, params.stop_token_ids) == (["x"], {5: 1.0}, [1])


def test_frozen_keyword_only_and_hashable() -> None:
    params = SamplingParams(stop="x", logit_bias={1: 1.0})
    for name in FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError, match=r"params = params.replace\("):
            setattr(params, name, getattr(params, name))
    with pytest.raises(TypeError):
        SamplingParams(2)  # type: ignore[misc]
    twin = SamplingParams(stop=["x"], logit_bias={1: 1})
    assert params == twin and hash(params) == hash(twin)
    assert len({params, twin, SamplingParams(), SamplingParams(temperature=0.5)}) == 3


def test_replace_makes_new_checked_params() -> None:
    params = SamplingParams(temperature=0.5, stop="x")
    changed = params.replace(max_tokens=3)
    assert (changed.max_tokens, changed.temperature, changed.stop) == (3, 0.5, ["x"])
    assert params.max_tokens == 16
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        params.replace(max_tokens=0)
    with pytest.raises(ValueError, match="unknown sampling parameter 'max_token'; did you mean 'max_tokens'"):
        params.replace(max_token=3)


def test_from_dict() -> None:
    values = {"temperature": 0.5, "stop": "x"}
    assert SamplingParams.from_dict(values) == SamplingParams(**values)
    assert SamplingParams.from_dict({}) == SamplingParams()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temprature": 1}, "unknown sampling parameter 'temprature'; did you mean 'temperature'"),
        ({"max_new_tokens": 5}, "did you mean 'max_tokens'"),
        ({"zzz": 1}, "unknown sampling parameter 'zzz'; known: n, presence_penalty"),
        ({5: 1}, "unknown sampling parameter 5"),
        (None, "must be a dict like .*got NoneType"),
        ([("n", 1)], "must be a dict like .*got list"),
        (SamplingParams(), "must be a dict like .*got SamplingParams"),
    ],
)
def test_from_dict_refuses(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams.from_dict(values)


# ---- any values at all

TOKEN_IDS = st.integers(0, 10**6)
TEXTS = st.lists(st.text(min_size=1, max_size=4), max_size=3)
VALID: dict[str, st.SearchStrategy[Any]] = {
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0, 1e30, exclude_min=True),
    "temperature": st.floats(0.01, 1e30) | st.integers(1, 3),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 10**9),
    "min_p": st.floats(0, 1),
    "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
    "stop": st.none() | TEXTS | st.text(min_size=1, max_size=4),
    "stop_token_ids": st.none() | st.lists(TOKEN_IDS, max_size=3) | st.sets(TOKEN_IDS, max_size=3),
    "bad_words": st.none() | TEXTS,
    "ignore_eos": st.booleans(),
    "max_tokens": st.none() | st.integers(100, 10**9),
    "min_tokens": st.integers(0, 16),
    "logprobs": st.none() | st.integers(-1, 10**6),
    "prompt_logprobs": st.none() | st.integers(-1, 10**6),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "output_kind": st.sampled_from(RequestOutputKind),
    "logit_bias": st.none() | st.dictionaries(TOKEN_IDS, st.floats(-100, 100), max_size=3),
    "allowed_token_ids": st.none() | st.lists(TOKEN_IDS, min_size=1, max_size=3),
    "n": st.integers(1, 1000),
}
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.complex_numbers(),
    st.lists(st.integers() | st.text(max_size=3) | st.none() | st.floats(), max_size=3),
    st.dictionaries(st.integers() | st.text(max_size=3) | st.none(), st.none() | st.floats(), max_size=3),
    st.sampled_from([object(), int, lambda: 0, ..., range(3), 10**400, -(10**400), RequestOutputKind.DELTA]),
)


@given(values=st.fixed_dictionaries({}, optional=VALID))
def test_valid_values_in_any_combination(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert params.replace() == params
    assert SamplingParams.from_dict(dataclasses.asdict(params)) == params
    assert isinstance(hash(params), int) and not params.is_greedy


@given(values=st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=4))
def test_junk_is_refused_by_a_value_error_or_accepted(values: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**values)
    except ValueError as error:
        assert any(name in str(error) for name in FIELDS)
    else:
        assert params.replace() == params


@pytest.mark.parametrize("name", [name for name in FIELDS if len(name) > 5])  # "top_" might be top_p or top_k
def test_a_slip_of_the_keyboard_finds_the_nearest_name(name: str) -> None:
    for i in range(len(name)):
        with pytest.raises(ValueError, match=f"did you mean '{name}'"):
            SamplingParams.from_dict({name[:i] + name[i + 1 :]: 1})
