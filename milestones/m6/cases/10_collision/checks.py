"""What a fix of case 10 must do."""

from pathlib import Path
from typing import Any

from folovllm.core.prefix_index import HashPrefixIndex
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import make_core, make_request, schedule_and_run
from folovllm.parts import load_class

VARIANTS = {"an engine whose index is a tree": {"core.prefix_index.hash": "folovllm.core.prefix_trie:TriePrefixIndex"}}
Faulty: Any = load_class(f"{Path(__file__).with_name('fault.py')}:HashPrefixIndex")


class Verified(Faulty):
    """The weak hash of the case, with the lookup of the engine: what a fix is compared with."""

    match = HashPrefixIndex.match


@check("unit", spec="R6.4")
def whatever_the_hash(mine: Mine) -> None:
    """A block is a hit only behind the same tokens, even if all hashes are equal; what is equal is still a hit."""
    first = [1, 2, 3, 4]
    for prompt, expected in (
        ([1, 2, 3, 4, 9], 4),
        ([4, 3, 2, 1, 9], 0),  # other tokens
        ([1, 2, 3, 4, 1, 2, 3, 4, 9], 4),  # the same tokens at another place
        ([5, 6, 7, 8, 1, 2, 3, 4, 9], 0),
    ):
        core = make_core(block_size=4, num_kv_blocks=9, max_model_len=16, enable_prefix_caching=True, parts=mine.parts)
        core.scheduler.kv_cache_manager.block_pool.prefix_index.hasher.hash_function = lambda data: b"x"  # type: ignore[attr-defined]
        core.add_request(make_request("first", first, max_tokens=1))
        schedule_and_run(core)
        request = make_request("second", prompt, max_tokens=1)
        core.add_request(request)
        core.scheduler.schedule()
        assert request.num_cached_tokens == expected, (
            f"with one hash for everything, {prompt} after {first} took {request.num_cached_tokens} tokens from "
            f"the cache, expected {expected}"
        )
