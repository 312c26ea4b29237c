"""Case 8: a request waits for memory while another one takes the blocks that it would have hit."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine

P = [1, 2, 3, 4, 5, 6, 7, 8]


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(parts, block_size=4, num_kv_blocks=7, max_model_len=24, enable_prefix_caching=True)
    requests = [
        make_request("a", P, max_tokens=1),
        make_request("busy", list(range(40, 52)), max_tokens=10),
        make_request("b", [*P, 60, 61, 62, 63, 64, 65], max_tokens=4),
    ]
    tokens = generate(core, requests, at=[0, 1, 3])
    for request in requests:
        expected = alone(request.prompt_token_ids, request.max_tokens)
        assert tokens[request.request_id] == expected, f"{request.request_id} got {tokens[request.request_id]}"
