"""Reading values out of a HuggingFace JSON file, and refusing the wrong ones in one shape.

Milestone: M0. vLLM counterpart: none; vLLM reads attributes of transformers' config objects.

Row 0: plain data, no torch. Every refusal is a `ConfigError` with three parts: what was expected, what was found, what
to do about it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

CORRECT_IT = "correct config.json or download it again"


class ConfigError(ValueError):
    """A JSON file of the model describes something that FoloVLLM cannot run."""


def refuse(expected: str, found: str, todo: str) -> NoReturn:
    raise ConfigError(f"expected {expected}; found {found}; to fix it: {todo}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ConfigError if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        refuse(f"valid JSON in {path.name}", str(error), "download the file again")
    if not isinstance(value, dict):
        refuse(f"a JSON object in {path.name}", type(value).__name__, "download the file again")
    return value


def is_int(value: Any) -> bool:
    """Whether `value` is an integer; True is one to Python, and never meant as one in these files."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def require(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        refuse(f"{key!r} in config.json", "no such key", "download the model's config.json again")
    return config[key]


def positive_int(config: Mapping[str, Any], key: str) -> int:
    value = require(config, key)
    if not is_int(value) or value <= 0:
        refuse(f"a positive integer as {key!r}", repr(value), CORRECT_IT)
    return int(value)


def positive_float(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """`config[key]` as a float; `default` if it is absent or null and there is a default."""
    if default is not None and config.get(key) is None:
        return default
    value = require(config, key)
    if not is_number(value) or not value > 0:
        refuse(f"a positive number as {key!r}", repr(value), CORRECT_IT)
    return float(value)
