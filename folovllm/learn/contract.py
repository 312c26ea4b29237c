"""The contract: the learner's file loads, its class fits the engine, and the methods are really the learner's own.

Milestone: M0. vLLM counterpart: none.

Without the last point, a file that re-exports the engine's class would pass every check: the engine would grade itself.
"""

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from folovllm.learn.exercise import ALL_PARTS, Exercise
from folovllm.parts import PARTS, load_file

CALLED_BY_PYTHON = ("__exit__", "__aexit__")  # by position, whatever the names of their parameters


class ContractError(ValueError):
    """What does not fit, with the fix. `line` is where in the learner's file, if it is one place."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def load_work(exercise: Exercise, path: Path) -> Any:
    """Returns the class of a learner's file, held to the contract. Raises ContractError, or ValueError if the file
    cannot be run. For the capstone, returns the parts of its engine.
    """
    if exercise.part == ALL_PARTS:
        return _load_engine(path)
    module = load_file(path)
    cls = vars(module).get(exercise.class_name)
    if not inspect.isclass(cls):
        raise ContractError(f"the file has no class {exercise.class_name}; give your class that name")
    _check_parts_methods(exercise, cls)
    for name in exercise.write:
        _check_method(exercise, cls, name, path)
    return cls


def _load_engine(path: Path) -> dict[str, str]:
    """The parts that `mine.write_engine` has listed, if none is missing."""
    engine = json.loads(path.read_text(encoding="utf-8"))
    if engine["missing"]:
        raise ContractError(f"your engine still runs on borrowed parts; pass {', '.join(engine['missing'])} first")
    parts: dict[str, str] = engine["parts"]
    return parts


def _check_parts_methods(exercise: Exercise, cls: Any) -> None:
    if issubclass(cls, exercise.reference_class):
        return
    methods = PARTS[exercise.part].methods if exercise.part in PARTS else exercise.write
    missing = [name for name in methods if not callable(getattr(cls, name, None))]
    if missing:
        raise ContractError(
            f"{exercise.class_name} lacks {', '.join(missing)}, which the engine calls: write them too, or inherit "
            f"from {_dotted(exercise.reference_class)}"
        )


# ---- whose method is it?


def _check_method(exercise: Exercise, cls: Any, name: str, path: Path) -> None:
    """Provenance and signature of one method."""
    mine, reference = inspect.getattr_static(cls, name, None), inspect.getattr_static(exercise.reference_class, name)
    function = plain_function(mine)
    if function is None or not hasattr(function, "__code__"):
        raise ContractError(f"{exercise.class_name} has no method {name}; it is one that you write")
    if Path(function.__code__.co_filename).resolve() != path.resolve():
        raise ContractError(
            f"your file does not define {name}: it is still the engine's own, which would grade itself; write "
            f"`def {name}` in {exercise.class_name}"
        )
    if type(mine) is not type(reference):
        kinds = {staticmethod: "a @staticmethod", classmethod: "a @classmethod", property: "a @property"}
        kind = kinds.get(type(reference), "a plain method")
        raise ContractError(f"{name} must be {kind}, as in the engine", function.__code__.co_firstlineno)
    if mismatch := signature_mismatch(function, plain_function(reference)):
        raise ContractError(f"{name}: {mismatch}", function.__code__.co_firstlineno)


def plain_function(member: Any) -> Any:
    """The function inside a method, static method, class method or property."""
    if isinstance(member, property):
        member = member.fget
    return inspect.unwrap(getattr(member, "__func__", member)) if member is not None else None


def takes_by_position(function: Any, num_args: int) -> bool:
    """Whether a call with this number of positional arguments, `self` among them, fits the parameters."""
    try:
        inspect.signature(function).bind(*[None] * num_args)
    except TypeError:
        return False
    return True


def signature_mismatch(mine: Any, reference: Any) -> str | None:
    """Returns how the parameters differ, or None if every call that the engine makes fits.

    Extra parameters with a default are fine, and so is another default. The parameters of a method in
    CALLED_BY_PYTHON may have any name, and `*exc` may stand for several.
    """
    if mine.__name__ in CALLED_BY_PYTHON and takes_by_position(mine, len(inspect.signature(reference).parameters)):
        return None
    own, wanted = (list(inspect.signature(f).parameters.values()) for f in (mine, reference))
    same = [(p.name, p.kind) for p in own[: len(wanted)]] == [(p.name, p.kind) for p in wanted]
    can_be_left_out = all(p.default is not p.empty or q.default is q.empty for p, q in zip(own, wanted, strict=False))
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    extra_is_optional = all(p.default is not p.empty or p.kind in variadic for p in own[len(wanted) :])
    if same and can_be_left_out and extra_is_optional:
        return None
    shown = [", ".join(str(p.replace(annotation=p.empty)) for p in side) for side in (own, wanted)]
    return f"its parameters are ({shown[0]}), and the engine calls it with ({shown[1]})"


# ---- does it let the engine do the work?


@contextlib.contextmanager
def refuse_borrowing(exercise: Exercise, path: Path) -> Iterator[None]:
    """In the body, the engine's own methods of `write` raise ContractError if a function of the learner's file calls
    them, by whatever way it got there: super(), getattr, another import, a helper class, a decorator.
    """
    originals = []
    for name in exercise.write:
        owner = next((cls for cls in exercise.reference_class.__mro__ if name in vars(cls)), None)
        if owner is None:
            raise ValueError(f"{exercise.id}: {_dotted(exercise.reference_class)} has no method {name}; mend `write`")
        originals.append((owner, name, vars(owner)[name]))
        setattr(owner, name, _refusing(name, vars(owner)[name], path))
    try:
        yield
    finally:
        for owner, name, member in originals:
            setattr(owner, name, member)


def _refusing(name: str, member: Any, path: Path) -> Any:
    """The method, static method, class method or property `member`, but not for callers in the file `path`."""
    function = plain_function(member)

    @functools.wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_code.co_filename == str(path):
            raise ContractError(f"{name} of the engine is called here, which would grade itself; write what it does")
        return function(*args, **kwargs)

    return type(member)(refusing) if isinstance(member, (staticmethod, classmethod, property)) else refusing


def _dotted(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
