"""What a fix of case 5 must do."""

import random
from pathlib import Path

from folovllm.engine.core import EngineCore
from folovllm.learn.cases import load_case
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import add_all, make_request, steps_of
from folovllm.learn.toy_runner import TwoRankRunner, make_engine

VARIANTS = {"an engine with another seed": {"toy.runner": "checks.py:OtherSeed"}}


class OtherSeed(TwoRankRunner):
    """Both ranks begin with 7."""

    def make_random(self, rank: int) -> random.Random:
        return random.Random(7)


def tokens_of_ranks(core: EngineCore) -> list[dict[str, list[int]]]:
    """What each rank takes the tokens of the requests to be."""
    return [{name: state.token_ids for name, state in rank.requests.items()} for rank in core.executor.ranks]  # type: ignore[attr-defined]


def first_wrong_step() -> int:
    """The first step after which the ranks have different tokens. The trace shows those of the first rank only."""
    case = load_case(Path(__file__).parent)
    core = make_engine(case.fault, **case.engine)
    for step in steps_of(core, [(at, make_request(**args)) for at, args in case.workload.arrivals]):
        core.step()
        first, second = tokens_of_ranks(core)
        if first != second:
            return step
    raise AssertionError("the ranks never differ")


@check("unit", spec="R1.26")
def ranks_have_the_same_tokens(mine: Mine) -> None:
    """After every step, both ranks continue the same text."""
    core = make_engine(mine.parts, block_size=4, num_kv_blocks=30, max_num_seqs=4)
    add_all(core, [make_request(f"r{i}", [i + 1, 5, 6], max_tokens=8, temperature=0.4 * i) for i in range(4)])
    for step in range(8):
        core.step()
        first, second = tokens_of_ranks(core)
        assert first == second, f"after step {step} rank 0 continues {first}, and rank 1 continues {second}"


@check("unit", spec="R1.26")
def draws_differ(mine: Mine) -> None:
    """A temperature still draws: not every number is the same."""
    generator = mine.cls().make_random(0)
    draws = [generator.randrange(1000) for _ in range(8)]
    assert len(set(draws)) > 1, f"eight draws gave the same number, {draws[0]}: sampling would be greedy"
