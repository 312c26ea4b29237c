"""Case 2: a prompt of which two blocks are in the cache, with budget left for more than the rest."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(parts, block_size=4, num_kv_blocks=30, max_model_len=32, enable_prefix_caching=True)
    prompt = list(range(100, 110))
    for request_id in ("cold", "warm"):
        tokens = generate(core, [make_request(request_id, prompt, max_tokens=3)])
        assert tokens[request_id] == alone(prompt, 3), f"the {request_id} request got {tokens[request_id]}"
