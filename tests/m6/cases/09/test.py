"""Case 9: a request is withdrawn from the step that would have filled one more of its blocks."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(
        parts, block_size=4, num_kv_blocks=7, max_model_len=24, long_prefill_token_threshold=6,
        enable_chunked_prefill=True, enable_prefix_caching=True, scheduling_policy="priority",
    )  # fmt: skip
    prompt = list(range(20, 40))
    requests = [
        make_request("batch", prompt, max_tokens=2, priority=5),
        make_request("urgent", [1, 2, 3, 4], max_tokens=2, priority=0),
    ]
    assert generate(core, requests, at=[0, 1])["batch"] == alone(prompt, 2), "batch got other tokens than alone"
