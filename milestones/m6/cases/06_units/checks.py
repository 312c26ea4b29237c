"""What a fix of case 6 must do."""

from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import add_all, make_core, make_request, schedule_and_run

VARIANTS = {"an engine whose index is a tree": {"core.prefix_index.hash": "folovllm.core.prefix_trie:TriePrefixIndex"}}
PROMPT = list(range(100, 108))  # two blocks


@check("unit", spec="R6.22")
def a_hit_takes_a_free_block(mine: Mine) -> None:
    """A cached block that no request holds takes one block from the free ones, whatever the block size is."""
    for num_busy_blocks in range(4):
        core = make_core(
            block_size=4, num_kv_blocks=6, max_model_len=16, enable_prefix_caching=True, parts=mine.parts
        )  # 5 usable blocks
        add_all(core, [make_request("turn-1", PROMPT, max_tokens=1)])
        schedule_and_run(core)
        pool = core.scheduler.kv_cache_manager.block_pool
        busy = pool.get_new_blocks(num_busy_blocks)
        core.scheduler.add_request(make_request("turn-2", [*PROMPT, 1, 2], max_tokens=1))  # two hits and a new block
        admitted = "turn-2" in core.scheduler.schedule().num_scheduled_tokens
        assert admitted == (num_busy_blocks <= 2), (
            f"5 blocks, {len(busy)} of them busy: a request that hits 2 free blocks and needs a new one was "
            f"{'admitted' if admitted else 'left waiting'}"
        )


@check("unit", spec="R6.22")
def a_block_that_is_held_costs_nothing(mine: Mine) -> None:
    """A cached block that another request holds is not among the free ones, so a hit on it takes none."""
    core = make_core(block_size=4, num_kv_blocks=6, max_model_len=16, enable_prefix_caching=True, parts=mine.parts)
    add_all(core, [make_request("first", [*PROMPT, 9], max_tokens=4)])
    schedule_and_run(core)  # holds 3 of 5 blocks
    core.scheduler.add_request(make_request("second", [*PROMPT, 1, 2], max_tokens=1))
    scheduled = core.scheduler.schedule().num_scheduled_tokens
    assert "second" in scheduled, (
        "with 2 blocks free, a request that shares two blocks with a running one and needs one more was left to wait"
    )
