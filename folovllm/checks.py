"""Checks of arguments. Each raises a ValueError that names the argument, the value, and what would be right.

Milestone: M0. vLLM counterpart: the validators of vllm/config and vllm/sampling_params.py.

Row 0: plain data, no torch.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

from folovllm.utils import did_you_mean

# What other programs call it; a comparison of letters would take "gpu" for a "cpu".
OTHER_NAMES = {
    "gpu": "cuda",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
}


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_int(name: str, value: Any, low: int, high: int | None = None, hint: str = "") -> None:
    """Checks for an integer within `low`..`high`. A bool is refused: True is 1 to Python, but not to a user."""
    more = f" ({hint})" if hint else ""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}{_as_number(value, whole=True)}{more}")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bounds}, got {value}{more}")


def check_number(name: str, value: Any, low: float, high: float, low_open: bool = False) -> None:
    """Checks for a finite number within `low`..`high`. With `low_open`, `low` itself is refused."""
    largest = sys.float_info.max  # not math.isfinite: an integer of 400 digits overflows it
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not -largest <= value <= largest:
        raise ValueError(f"{name} must be a finite number, got {value!r}{_as_number(value, whole=False)}")
    if value < low or value > high or (low_open and value == low):
        bounds = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name} must be in {bounds}, got {value}")


def _as_number(value: Any, whole: bool) -> str:
    """What to write instead of a value of the wrong type. E.g. "16" or 16.0 -> "; write 16", and "many" -> ""."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return ""
    if isinstance(value, bool) or not math.isfinite(number) or (whole and not number.is_integer()):
        return ""
    return f"; write {int(number) if number.is_integer() else number}"


def check_type(name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise ValueError(f"{name} must be a {expected.__name__}, got {type(value).__name__}: {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}{_did_you_mean(value, choices)}")


def check_auto_or_bool(name: str, value: Any) -> None:
    if value is not True and value is not False and value != "auto":
        raise ValueError(f"{name} must be 'auto', True or False, got {value!r}")


def check_needs(name: str, value: bool | str, needs: Mapping[str, bool]) -> None:
    """Checks that a switch set to True has all that it `needs`: what must be set -> whether it is."""
    missing = [need for need, given in needs.items() if not given]
    if value is True and missing:
        raise ValueError(
            f"{name}=True needs {', '.join(missing)}: set that too, or use {name}='auto', which does without"
        )


def _did_you_mean(value: Any, choices: tuple[str, ...]) -> str:
    """E.g. for torch.float16, "fp16" or "flaot16": "; did you mean 'float16'?"."""
    text = str(value).lower().removeprefix("torch.")
    return did_you_mean(OTHER_NAMES.get(text, text), choices, cutoff=0.6)


def check_optional_int(name: str, value: Any, low: int, high: int | None = None, hint: str = "") -> None:
    if value is not None:
        check_int(name, value, low, high, hint)
