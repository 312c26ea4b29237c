# refused-by: check_test | passes on the faulty engine
"""A preemption of a long prompt, but first come, first served: the victim has no tokens in that step yet."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(
        parts, block_size=4, num_kv_blocks=7, max_model_len=24, long_prefill_token_threshold=6,
        enable_chunked_prefill=True, enable_prefix_caching=True,
    )  # fmt: skip
    prompt = list(range(20, 40))
    requests = [make_request("urgent", [1, 2, 3, 4], max_tokens=2), make_request("batch", prompt, max_tokens=2)]
    assert generate(core, requests)["batch"] == alone(prompt, 2), "batch got other tokens than alone"
