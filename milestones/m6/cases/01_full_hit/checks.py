"""What a fix of case 1 must do."""

from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import add_all, make_core, make_request, schedule_and_run

VARIANTS = {"an engine whose index is a tree": {"core.prefix_index.hash": "folovllm.core.prefix_trie:TriePrefixIndex"}}


@check("unit", spec="R6.5")
def every_length_around_a_block(mine: Mine) -> None:
    """A prompt that was served before is hit as far as it can be, and at least one token is left to compute."""
    for length in range(1, 14):
        core = make_core(block_size=4, num_kv_blocks=12, max_model_len=16, enable_prefix_caching=True, parts=mine.parts)
        prompt = list(range(100, 100 + length))
        for request_id in ("first", "second"):
            request = make_request(request_id, prompt, max_tokens=1)
            add_all(core, [request])
            schedule_and_run(core)
        assert request.num_output_tokens == 1, (
            f"a prompt of {length} tokens (blocks of 4), sent a second time, got no token: it was not started"
        )
        hit, most = request.num_cached_tokens, (length - 1) // 4 * 4
        assert hit == most, (
            f"a prompt of {length} tokens, sent a second time, took {hit} tokens from the cache (blocks of 4); {most} "
            "are the most that leave a token to compute"
        )
