# refused-by: check_test | passes on the faulty engine
"""Sends a prompt twice, but not one that ends with a block."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(parts, block_size=4, num_kv_blocks=20, enable_prefix_caching=True)
    prompt = [11, 12, 13, 14, 15, 16, 17, 18, 19]
    for request_id in ("first", "second"):
        tokens = generate(core, [make_request(request_id, prompt, max_tokens=3)])
        assert tokens[request_id] == alone(prompt, 3), f"{request_id} got other tokens than alone"
