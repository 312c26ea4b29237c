# refused-by: check_test | passes on the faulty engine
"""A long prompt, but in one piece: the budget is larger than the prompt."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(
        parts, block_size=4, num_kv_blocks=20, max_model_len=32, max_num_batched_tokens=32, enable_chunked_prefill=True
    )
    prompt = list(range(20, 32))
    assert generate(core, [make_request("doc", prompt, max_tokens=4)])["doc"] == alone(prompt, 4), "other tokens"
