# refused-by: check_test | passes on the faulty engine
"""Two prompts that share nothing, but whose blocks have different hashes even under the weak one."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(parts, block_size=4, num_kv_blocks=20, enable_prefix_caching=True)
    for request_id, prompt in (("anna", [10, 20, 30, 40, 5]), ("ben", [11, 22, 33, 44, 6])):
        tokens = generate(core, [make_request(request_id, prompt, max_tokens=3)])[request_id]
        assert tokens == alone(prompt, 3), f"{request_id} got {tokens}"
