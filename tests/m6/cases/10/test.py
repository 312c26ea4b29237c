"""Case 10: the same tokens in another order, which have the same sum."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(parts, block_size=4, num_kv_blocks=20, enable_prefix_caching=True)
    for request_id, prompt in (("anna", [10, 20, 30, 40, 5]), ("ben", [40, 30, 20, 10, 6])):
        tokens = generate(core, [make_request(request_id, prompt, max_tokens=3)])[request_id]
        assert tokens == alone(prompt, 3), f"{request_id} got {tokens}"
