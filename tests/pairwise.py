"""Pairwise covering arrays: few test cases in which every value of every switch meets every value of every other.

Milestone: M3. vLLM counterpart: none. Most bugs of a combination need only two switches to show, so covering all pairs
finds nearly what the full product would, in a fraction of the cases.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

Case = dict[str, Any]
Pair = frozenset[tuple[str, int]]  # two of (switch, index of its value)


def pairwise(switches: Mapping[str, Sequence[Any]]) -> list[Case]:
    """A covering array of strength two, greedy and deterministic: not the smallest one, but near it.

    E.g. three switches of two values each: 4 cases instead of 8.
    """
    uncovered = dict.fromkeys(_all_pairs(switches))  # a dict and not a set: the order, hence the result, is fixed
    cases = []
    while uncovered:
        row = _next_row(switches, uncovered)
        for pair in _pairs_of(row):
            uncovered.pop(pair, None)
        cases.append({name: switches[name][index] for name, index in row.items()})
    return cases


def slow_but_pairwise(switches: Mapping[str, Sequence[Any]]) -> list[Any]:
    """Every combination, for pytest.mark.parametrize(tuple(switches), ...). Those outside a covering array are slow."""
    kept = pairwise(switches)
    return [pytest.param(*case.values(), marks=[pytest.mark.slow] * (case not in kept)) for case in product(switches)]


def product(switches: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Every combination."""
    return [dict(zip(switches, values, strict=True)) for values in itertools.product(*switches.values())]


def _all_pairs(switches: Mapping[str, Sequence[Any]]) -> Iterator[Pair]:
    for (a, a_values), (b, b_values) in itertools.combinations(switches.items(), 2):
        for i, j in itertools.product(range(len(a_values)), range(len(b_values))):
            yield frozenset({(a, i), (b, j)})


def _pairs_of(row: Mapping[str, int]) -> Iterator[Pair]:
    return (frozenset(two) for two in itertools.combinations(row.items(), 2))


def _next_row(switches: Mapping[str, Sequence[Any]], uncovered: Mapping[Pair, None]) -> dict[str, int]:
    """Start from the first pair still uncovered, then give each switch the value that covers most of the rest."""
    row = dict(sorted(next(iter(uncovered))))
    for name in switches:
        if name not in row:
            gains = [
                sum(frozenset({(name, i), cell}) in uncovered for cell in row.items()) for i in _indices(switches, name)
            ]
            row[name] = gains.index(max(gains))
    return {name: row[name] for name in switches}


def _indices(switches: Mapping[str, Sequence[Any]], name: str) -> range:
    return range(len(switches[name]))
