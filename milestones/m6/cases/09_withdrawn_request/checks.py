"""What a fix of case 9 must do."""

from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import make_core, make_request

VARIANTS = {"an engine whose index is a tree": {"core.prefix_index.hash": "folovllm.core.prefix_trie:TriePrefixIndex"}}


@check("unit", spec="R6.10")
def only_what_was_not_computed_is_forgotten(mine: Mine) -> None:
    """Of a request that is withdrawn from its step, the blocks of earlier steps stay cached, and no others."""
    core = make_core(block_size=4, num_kv_blocks=12, max_model_len=32, enable_prefix_caching=True, parts=mine.parts)
    manager, batch = core.scheduler.kv_cache_manager, make_request("batch", list(range(20, 46)), max_tokens=1)
    manager.add_request(batch)
    manager.allocate_slots(batch, 10)  # this step runs: 2 full blocks
    manager.end_step(has_run=True)
    batch.num_computed_tokens = 10
    manager.allocate_slots(batch, 14)  # this one would fill 4 more
    manager.preempt(batch)
    batch.num_computed_tokens = 0
    hits = len(manager.get_computed_blocks(batch)[0])
    assert hits == 2, (
        "an earlier step had filled 2 blocks, and the request was withdrawn from a step that would have filled 4 more: "
        f"{hits} of the 6 are in the prefix cache, expected 2"
    )
