"""What a fix of case 8 must do."""

from folovllm.engine.core import EngineCore
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import make_core, make_request, schedule_and_run

VARIANTS = {"an engine whose index is a tree": {"core.prefix_index.hash": "folovllm.core.prefix_trie:TriePrefixIndex"}}


P = list(range(100, 108))  # two blocks


def small_core(mine: Mine) -> EngineCore:
    return make_core(block_size=4, num_kv_blocks=5, max_model_len=16, enable_prefix_caching=True, parts=mine.parts)


@check("unit", spec="R6.22")
def what_is_new_is_found(mine: Mine) -> None:
    """A waiting request hits what another request has computed since it was first looked up."""
    core = small_core(mine)
    manager, waiting = core.scheduler.kv_cache_manager, make_request("waiting", [*P, 1], max_tokens=1)
    manager.add_request(waiting)
    early, _ = manager.get_computed_blocks(waiting)
    assert not early, f"the cache is empty, and {early} were named"
    core.add_request(make_request("first", P, max_tokens=1))
    schedule_and_run(core)
    hits, num_tokens = manager.get_computed_blocks(waiting)
    assert len(hits) == 2 and num_tokens == 8, (
        f"both blocks of the prefix are cached by now, but a second lookup gives {hits} and {num_tokens} tokens"
    )


@check("unit", spec="R6.22")
def what_is_gone_is_no_hit(mine: Mine) -> None:
    """A waiting request does not hit blocks that were handed out since it was first looked up."""
    core = small_core(mine)
    core.add_request(make_request("first", P, max_tokens=1))
    schedule_and_run(core)
    manager, waiting = core.scheduler.kv_cache_manager, make_request("waiting", [*P, 1], max_tokens=1)
    manager.add_request(waiting)
    early, _ = manager.get_computed_blocks(waiting)
    assert len(early) == 2, f"both blocks of the prefix are cached, and {early} were named"
    core.add_request(make_request("other", list(range(14)), max_tokens=1))  # takes all 4 blocks, and gives them back
    schedule_and_run(core)
    late, num_tokens = manager.get_computed_blocks(waiting)
    assert not late and num_tokens == 0, (
        f"both blocks hold another prefix since, but {late} were named as holding {num_tokens} tokens of this one"
    )
