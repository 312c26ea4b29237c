"""Claims about the arms of a bench: "kv_util(m3) > kv_util(m2)", "peak_tokens(m5) <= budget(m5)".

Milestone: M2. vLLM counterpart: none. Row 1: no torch.

A claim compares sums, products and quotients of numbers and metric(arm). It is parsed and never evaluated as Python.
Times are refused: a claim must hold on every machine.
"""

import ast
import operator
from collections.abc import Mapping
from typing import Any

from folovllm.sim.counting import TIMES
from folovllm.utils import unknown_name_message

Arms = Mapping[str, Mapping[str, Any]]
COMPARISONS: dict[type, Any] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
ARITHMETIC: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def holds(claim: str, arms: Arms) -> bool:
    """Whether a claim is true of the arms. Raises ValueError if it is not a claim."""
    values, comparisons = _parsed(claim, arms)
    for i, comparison in enumerate(comparisons):
        texts = isinstance(values[i], tuple) or isinstance(values[i + 1], tuple)
        if texts and comparison not in (operator.eq, operator.ne):
            raise ValueError(f"{claim!r}: tokens are equal or not; there is no order between them")
    return all(comparison(values[i], values[i + 1]) for i, comparison in enumerate(comparisons))


def values_of(claim: str, arms: Arms) -> list[Any]:
    """The value of each side. E.g. "steps(m2) < steps(m1)" -> [24, 160]."""
    return _parsed(claim, arms)[0]


def _parsed(claim: str, arms: Arms) -> tuple[list[Any], list[Any]]:
    try:
        node = ast.parse(claim, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{claim!r}: {error.msg}") from None
    if not isinstance(node, ast.Compare) or any(type(op) not in COMPARISONS for op in node.ops):
        raise ValueError(f"{claim!r} is no comparison; write e.g. 'steps(m2) < steps(m1)'")
    values = [_value(side, claim, arms) for side in (node.left, *node.comparators)]
    return values, [COMPARISONS[type(op)] for op in node.ops]


def _value(node: ast.expr, claim: str, arms: Arms) -> Any:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            sides = _value(left, claim, arms), _value(right, claim, arms)
            if isinstance(op, ast.Div) and sides[1] == 0:
                raise ValueError(f"{claim!r}: {ast.unparse(right)} is 0, and nothing can be divided by it")
            if not any(isinstance(side, tuple) for side in sides):
                return ARITHMETIC[type(op)](*sides)
        case ast.Call(func=ast.Name(id=metric), args=[ast.Name(id=arm)], keywords=[]):
            return _metric(metric, arm, claim, arms)
    raise ValueError(f"{claim!r}: {ast.unparse(node)!r} is neither a number nor metric(arm)")


def _metric(metric: str, arm: str, claim: str, arms: Arms) -> Any:
    if arm not in arms:
        raise ValueError(f"{claim!r}: {unknown_name_message('arm', arm, list(arms))}")
    if metric in TIMES:
        raise ValueError(f"{claim!r}: {metric} is a modelled time; print it, but claim only counters")
    if metric not in arms[arm]:
        raise ValueError(f"{claim!r}: {unknown_name_message('metric', metric, list(arms[arm]))}")
    return arms[arm][metric]
