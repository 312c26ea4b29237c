"""Case 4: the first five tokens of several prompts."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine


def test(parts: Mapping[str, str]) -> None:
    for prompt in ([5, 6, 7, 8], [9, 8, 7], [30, 31, 32, 33, 34]):
        core = make_engine(parts, block_size=16, num_kv_blocks=4, max_num_seqs=1)
        assert generate(core, [make_request("r", prompt, max_tokens=5)])["r"] == alone(prompt, 5), f"{prompt}"
