# refused-by: check_test | passes on the faulty engine
"""A request that shares a prefix and waits, but for a seat: nothing needs the cached blocks meanwhile."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine

P = [1, 2, 3, 4, 5, 6, 7, 8]


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(
        parts, block_size=4, num_kv_blocks=30, max_model_len=24, max_num_seqs=1, enable_prefix_caching=True
    )
    requests = [make_request("a", P, 1), make_request("busy", [40, 41, 42], 9), make_request("b", [*P, 60], 4)]
    tokens = generate(core, requests, at=[0, 1, 2])
    assert tokens["b"] == alone([*P, 60], 4), f"b got {tokens['b']}"
