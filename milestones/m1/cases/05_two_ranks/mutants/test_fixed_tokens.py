# refused-by: check_test | an engine with another seed
"""Pins the tokens that one seed gives. A correct engine may use another seed."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import TwoRankRunner, generate, make_engine


def run(parts: Mapping[str, str]) -> list[int]:
    core = make_engine(parts, block_size=4, num_kv_blocks=20)
    return generate(core, [make_request("r", [1, 2, 3], max_tokens=4, temperature=0.8)])["r"]


def test(parts: Mapping[str, str]) -> None:
    place = f"{TwoRankRunner.__module__}:{TwoRankRunner.__name__}"
    assert run(parts) == run({"toy.runner": place}), "other tokens than with the engine's own seed"
