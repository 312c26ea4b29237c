"""The checks of m6/lru: where blocks are in the free queue, and what a cache that evicts them still knows."""

import random
from typing import Any

from folovllm.config import CacheConfig
from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex, NullPrefixIndex
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import drive, make_core, make_request


def prediction() -> str:
    core = make_core(block_size=4, num_kv_blocks=9, enable_prefix_caching=True)
    a = list(range(100, 110))
    for name, prompt in (("a", a), ("b", [*a[:8], 1, 2, 3]), ("c", list(range(200, 213)))):
        core.add_request(make_request(name, prompt, max_tokens=1))
        drive(core)
    pool = core.scheduler.kv_cache_manager.block_pool
    cached = [b.block_id for b in pool.free_block_queue.get_all_free_blocks() if b.block_hash is not None]
    return f"{free_ids(pool)}: {cached[0]} and then {cached[1]} are evicted first"


class Index(NullPrefixIndex):
    """A prefix index that only remembers which blocks it was told to forget, under which name."""

    def __init__(self) -> None:
        self.removed: list[tuple[int, bytes | None]] = []

    def remove(self, block: KVCacheBlock) -> None:
        self.removed.append((block.block_id, block.block_hash))


def free_ids(pool: BlockPool) -> list[int]:
    """Returns the ids of the free blocks, the one that is used next first."""
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


def take(pool: Any, n: int, cached: tuple[int, ...] = ()) -> list[KVCacheBlock]:
    """Returns n new blocks, of which those with the ids in `cached` get a hash."""
    blocks = pool.get_new_blocks(n)
    for block in blocks:
        if block.block_id in cached:
            block.block_hash = b"prefix %d" % block.block_id
    return list(blocks)


@check("unit", spec="R6.11", hint=2)
def the_worthless_first_the_cached_last(mine: Mine) -> None:
    """A block without a hash goes to the head of the queue, one with a hash to the tail, each in the given order."""
    pool = mine.cls(9)
    blocks = take(pool, 5, cached=(1, 2))
    pool.free_blocks(blocks[::-1])
    queue = free_ids(pool)
    assert queue == [5, 4, 3, 6, 7, 8, 2, 1], (
        f"1 and 2 have hashes, and 5, 4, 3, 2, 1 were freed: the queue is {queue}, expected [5, 4, 3, 6, 7, 8, 2, 1]: "
        "what can be hit is reused last, and of each kind the first given is the first to be used again"
    )


@check("unit", spec="R6.11", hint=2)
def the_switch_sends_all_to_the_tail(mine: Mine) -> None:
    """With free_uncached_first=False the order of freeing alone decides, as in vLLM v0.11.0."""
    pool = mine.cls(6, free_uncached_first=False)
    pool.free_blocks(take(pool, 3, cached=(2,))[::-1])
    queue = free_ids(pool)
    assert queue == [4, 5, 3, 2, 1], f"3, 2, 1 were freed: the queue is {queue}, expected [4, 5, 3, 2, 1]"


@check("unit", spec="R6.22", hint=2)
def a_hit_block_is_not_evicted(mine: Mine) -> None:
    """A free block that is hit leaves the queue. It belongs to a request, and must not be handed to another one."""
    pool = mine.cls(4)
    blocks = take(pool, 2, cached=(1, 2))
    pool.free_blocks(blocks[::-1])
    pool.touch(blocks[:1])
    assert free_ids(pool) == [3, 2], (
        f"block 1 was hit; the queue is {free_ids(pool)}, expected [3, 2]: a block that is in the queue and held is "
        "overwritten under its holder"
    )
    assert blocks[0].ref_cnt == 1, f"block 1 was hit, and its ref_cnt is {blocks[0].ref_cnt}, expected 1"
    assert blocks[0].block_hash is not None, "block 1 was hit and lost its hash: the next request could not hit it"


@check("unit", spec="R6.11", hint=3)
def a_held_block_gets_one_more_holder(mine: Mine) -> None:
    """A hit on a block in use only counts: it is not in the queue, and neither is the null block."""
    pool = mine.cls(4)
    (block,) = take(pool, 1, cached=(1,))
    pool.touch([block, pool.null_block])
    assert block.ref_cnt == 2, f"a block in use was hit, and its ref_cnt is {block.ref_cnt}, expected 2"
    assert free_ids(pool) == [2, 3], f"a block in use was hit, and the queue is {free_ids(pool)}, expected [2, 3]"


@check("unit", spec="R6.11", hint=1)
def a_hit_makes_young(mine: Mine) -> None:
    """A block that was hit and freed again is behind all that were freed before."""
    pool = mine.cls(5)
    one, two, three, _ = take(pool, 4, cached=(1, 2, 3, 4))
    for block in (one, two, three):
        pool.free_blocks([block])
    pool.touch([one])
    pool.free_blocks([one])
    queue = free_ids(pool)
    assert queue == [2, 3, 1], f"1, 2, 3 were freed, then 1 was hit and freed: the queue is {queue}, expected [2, 3, 1]"


@check("unit", spec="R6.22", hint=3)
def the_index_forgets_what_is_evicted(mine: Mine) -> None:
    """An evicted block is removed from the prefix index under the hash that it has, and has none afterwards."""
    index = Index()
    pool = mine.cls(3, prefix_index=index)
    blocks = take(pool, 2, cached=(1,))
    pool.free_blocks(blocks[::-1])
    pool.get_new_blocks(2)
    assert index.removed == [(1, b"prefix 1")], (
        f"block 1, with the hash 'prefix 1', has a new holder; the index was told to forget {index.removed}: it serves "
        "the block to whichever request asks for that prefix"
    )
    assert blocks[0].block_hash is None, "block 1 was evicted and still has a hash, so it will be kept as if cached"


@check("unit", spec="R6.11", hint=3)
def free_cached_blocks_are_counted(mine: Mine) -> None:
    """num_free_cached_blocks is the number of free blocks with a hash, after each of the three methods."""
    pool = mine.cls(5)
    blocks = take(pool, 3, cached=(1, 2))
    for what, action, expected in (
        ("free_blocks of 3, 2, 1", lambda: pool.free_blocks(blocks[::-1]), 2),
        ("touch of 1", lambda: pool.touch(blocks[:1]), 1),
        ("touch of 1 again", lambda: pool.touch(blocks[:1]), 1),
        ("get_new_blocks(3), which evicts 2", lambda: pool.get_new_blocks(3), 0),
    ):
        action()
        n = pool.num_free_cached_blocks
        assert n == expected, f"1 and 2 have hashes; after {what} num_free_cached_blocks is {n}, expected {expected}"


@check("property", spec="R6.11", hint=1)
def the_queue_is_the_order_of_use(mine: Mine) -> None:
    """Whatever requests do, the queue is what a plain list of block ids says: head first, cached ones by last use."""
    for seed in range(120):
        run_random_life(mine.cls(3 + seed // 20, prefix_index=Index()), random.Random(seed), 3 + seed // 4)


def run_random_life(pool: Any, rng: random.Random, num_steps: int) -> None:
    """Takes, caches, hits and frees. `queue` and `cached` are the same by the rules of the README, on lists."""
    queue, cached, story = list(range(1, pool.num_blocks)), set(), [f"{pool.num_blocks - 1} usable blocks"]
    tables: list[list[KVCacheBlock]] = []
    for _ in range(num_steps):
        action = rng.choice(("take", "take", "hit", "free", "free"))
        if action == "take" and queue:
            n = rng.randint(1, min(3, len(queue)))
            expected, queue = queue[:n], queue[n:]
            cached -= set(expected)
            table = pool.get_new_blocks(n)
            got = [block.block_id for block in table]
            story.append(f"get_new_blocks({n})")
            assert got == expected, f"{'; '.join(story)}: returned {got}, expected {expected}"
            for block in table[: rng.randint(0, n)]:
                block.block_hash = b"prefix %d" % block.block_id
                cached.add(block.block_id)
                story.append(f"{block.block_id} is cached")
            tables.append(table)
        elif action == "hit" and cached:
            block = pool.blocks[rng.choice(sorted(cached))]
            queue = [block_id for block_id in queue if block_id != block.block_id]
            story.append(f"touch([{block.block_id}])")
            pool.touch([block])
            tables.append([block])
        elif action == "free" and tables:
            table = tables.pop(rng.randrange(len(tables)))[::-1]
            held = [block for other in tables for block in other]
            freed = [block.block_id for block in table if block not in held]
            plain = [block_id for block_id in freed if block_id not in cached]
            queue = plain + queue + [block_id for block_id in freed if block_id in cached]
            story.append(f"free_blocks({[block.block_id for block in table]})")
            pool.free_blocks(table)
        assert free_ids(pool) == queue, f"{'; '.join(story)}: the queue is {free_ids(pool)}, expected {queue}"
        n = len(cached & set(queue))
        assert pool.num_free_cached_blocks == n, (
            f"{'; '.join(story)}: num_free_cached_blocks is {pool.num_free_cached_blocks}, expected {n}"
        )


@check("counters", spec="R6.11", hint=1)
def a_prompt_that_is_asked_for_often_stays(mine: Mine) -> None:
    """Among 100 prompts that come once, one that comes every third time is hit each time: the cache holds 4 prompts."""
    index = HashPrefixIndex(CacheConfig(block_size=4, enable_prefix_caching=True))
    pool, hits = mine.cls(1 + 4 * 3, prefix_index=index), 0
    for i in range(150):
        tokens = [7] * 12 if i % 3 == 0 else [1000 + i] * 12
        hits += serve(pool, index, [*tokens, 0]) if i % 3 == 0 else 0 * serve(pool, index, [*tokens, 0])
    assert hits == 49 * 3, (
        f"a prompt of 3 blocks came 50 times, with 2 others in between, and 12 blocks are there: {hits} blocks were "
        f"hit, expected {49 * 3}: it was used more recently than what should have been evicted"
    )


def serve(pool: Any, index: HashPrefixIndex, tokens: list[int]) -> int:
    """Runs one request on an otherwise idle pool: hits, new blocks, publication, the end. Returns the blocks hit."""
    request = make_request("r", tokens)
    request.attach_block_hasher(index.hash_new_blocks)
    hits = index.match(request)
    pool.touch(hits)
    table = [*hits, *pool.get_new_blocks(-(-len(tokens) // 4) - len(hits))]
    index.insert(request, table, len(tokens) // 4)
    pool.free_blocks(table[::-1])
    return len(hits)
