"""What the checks of an exercise are written with: the decorator `check`, and `Mine`, which a check is given.

Milestone: M0. vLLM counterpart: none.

    @check("unit", spec="R3.3", hint=1)
    def out_of_blocks_changes_nothing(mine: Mine) -> None:
        \"\"\"If too few blocks are free, an allocation raises and takes none.\"\"\"
        pool = mine.cls(num_blocks=4)
        ...
        assert free == 3, f"get_new_blocks(4) with 3 free left {free} free, expected 3: blocks were taken before ..."
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

LEVELS = ("contract", "unit", "property", "trace", "engine", "counters")
OWN_LEVELS = LEVELS[1:]  # those that checks.py may have checks for


@dataclass(frozen=True)
class Mine:
    """What is checked. `parts` is what make_core and LLM take, so that they build their engine with the class."""

    cls: Any
    parts: Mapping[str, str]
    reference: Any


CheckFunction = Callable[[Mine], None]


@dataclass(frozen=True)
class Check:
    """A function that raises AssertionError, with what was done, what came out and why it matters, if `mine` is wrong.

    `given` marks a check that the skeleton already passes. `seconds` is its time limit; 0 stands for that of its level.
    """

    level: str
    function: CheckFunction
    spec: str = ""
    hint: int = 1
    given: bool = False
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def doc(self) -> str:
        return " ".join((self.function.__doc__ or "").split())


def check(
    level: str, *, spec: str, hint: int = 1, given: bool = False, seconds: float = 0.0
) -> Callable[[CheckFunction], CheckFunction]:
    """Makes a function of checks.py a check of `level`. `hint` is the layer to ask for when it fails."""
    if level not in OWN_LEVELS:
        raise ValueError(f"unknown level {level!r}; a check is one of {', '.join(OWN_LEVELS)}")

    def mark(function: CheckFunction) -> CheckFunction:
        function.__folovllm_check__ = Check(level, function, spec, hint, given, seconds)  # type: ignore[attr-defined]
        return function

    return mark


def checks_of(module: ModuleType) -> list[Check]:
    """The checks of a module: level by level, and in a level as they are written."""
    found = [value.__folovllm_check__ for value in vars(module).values() if hasattr(value, "__folovllm_check__")]
    return sorted(found, key=lambda c: LEVELS.index(c.level))
