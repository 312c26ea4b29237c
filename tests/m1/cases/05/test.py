"""Case 5: after every step, the ranks have the same tokens."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(parts, block_size=4, num_kv_blocks=20)
    core.add_request(make_request("r", [1, 2, 3], max_tokens=6, temperature=0.8))
    for _ in range(5):
        core.step()
        first, second = (rank.requests["r"].token_ids for rank in core.executor.ranks)
        assert first == second, f"rank 0 has {first}, rank 1 has {second}"
