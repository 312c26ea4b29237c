"""Case 7: a request goes on after the one that it shares blocks with is done, and a third one needs blocks."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine

P = [1, 2, 3, 4, 5, 6, 7, 8]


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(parts, block_size=4, num_kv_blocks=8, max_model_len=24, enable_prefix_caching=True)
    requests = [
        make_request("a", [*P, 20], max_tokens=2),
        make_request("b", [*P, 30], max_tokens=10),
        make_request("c", list(range(50, 63)), max_tokens=2),
    ]
    tokens = generate(core, requests, at=[0, 0, 4])
    for request in requests:
        expected = alone(request.prompt_token_ids, request.max_tokens)
        assert tokens[request.request_id] == expected, f"{request.request_id} got {tokens[request.request_id]}"
