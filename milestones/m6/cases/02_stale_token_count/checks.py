"""What a fix of case 2 must do."""

from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import add_all, make_core, make_request, schedule_and_run

VARIANTS = {"an engine whose index is a tree": {"core.prefix_index.hash": "folovllm.core.prefix_trie:TriePrefixIndex"}}


@check("unit", spec="R6.8")
def the_budget_is_charged_with_what_is_computed(mine: Mine) -> None:
    """Tokens that the cache has cost nothing: the rest of the budget goes to the next request."""
    core = make_core(
        block_size=4, num_kv_blocks=30, max_model_len=32, max_num_batched_tokens=12, enable_chunked_prefill=True,
        enable_prefix_caching=True, parts=mine.parts,
    )  # fmt: skip
    prompt = list(range(100, 110))
    add_all(core, [make_request("warm", prompt, max_tokens=1)])
    schedule_and_run(core)
    again, other = make_request("again", prompt, max_tokens=1), make_request("other", list(range(10)), max_tokens=1)
    add_all(core, [again, other])
    output = core.scheduler.schedule()
    assert again.num_cached_tokens == 8, (
        f"a prompt of 10 tokens, sent again, took {again.num_cached_tokens} tokens from the cache; 8 are there"
    )
    scheduled = output.num_scheduled_tokens
    assert scheduled == {"again": 2, "other": 10}, (
        f"with a budget of 12, a request that lacks 2 tokens and one that lacks 10 more were given {scheduled}: a "
        "token that comes from the cache takes nothing from the budget"
    )
