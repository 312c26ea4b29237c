# refused-by: check_test | passes on the faulty engine
"""Many requests in one step, but none that hits the cache."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(parts, block_size=4, num_kv_blocks=30, max_model_len=32, enable_prefix_caching=True)
    requests = [make_request(f"r{i}", [i, *range(50, 59)], max_tokens=4) for i in range(4)]
    tokens = generate(core, requests)
    for request in requests:
        assert tokens[request.request_id] == alone(request.prompt_token_ids, 4), request.request_id
