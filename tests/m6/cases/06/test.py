"""Case 6: the second turn starts in the step in which it arrives."""

from collections.abc import Mapping

from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import make_engine


def test(parts: Mapping[str, str]) -> None:
    core = make_engine(parts, block_size=4, num_kv_blocks=10, max_model_len=24, enable_prefix_caching=True)
    history = [1, 2, 3, 4, 5, 6, 7, 8]
    core.add_request(make_request("turn-1", history, max_tokens=1))
    core.step()
    core.add_request(make_request("other", [40, 41, 42, 43, 44, 45], max_tokens=7))
    core.step()
    core.add_request(make_request("turn-2", [*history, 60, 61, 62], max_tokens=3))
    assert "turn-2" in [output.request_id for output in core.step()], "turn-2 waits"
