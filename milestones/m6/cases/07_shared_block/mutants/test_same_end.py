# refused-by: check_test | passes on the faulty engine
"""Two requests share their instructions, but they end in the same step: no block is freed under its other holder."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine

P = [1, 2, 3, 4, 5, 6, 7, 8]


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(parts, block_size=4, num_kv_blocks=8, max_model_len=24, enable_prefix_caching=True)
    tokens = generate(core, [make_request("a", [*P, 20], max_tokens=4), make_request("b", [*P, 30], max_tokens=4)])
    assert tokens["a"] == alone([*P, 20], 4) and tokens["b"] == alone([*P, 30], 4), f"{tokens}"
