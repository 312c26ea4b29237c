"""The checks of m3/block_pool. Each builds a pool of your class and looks at what two methods leave behind."""

import random
from typing import Any

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import NullPrefixIndex
from folovllm.learn.check import Mine, check


def prediction() -> str:
    """Runs the three requests of `predict` through the reference: 2, 3 and 1 blocks of 4 tokens."""
    pool = BlockPool(8)
    for num_tokens in (5, 9):
        pool.free_blocks(pool.get_new_blocks(-(-num_tokens // 4))[::-1])
    return (
        f"{ids(pool.get_new_blocks(1))}\nThe end of the second request's table was freed first, so it is reused first."
    )


class Index(NullPrefixIndex):
    """A prefix index that only remembers which blocks it was told to forget."""

    def __init__(self) -> None:
        self.removed: list[int] = []

    def remove(self, block: KVCacheBlock) -> None:
        assert block.block_hash is not None, f"block {block.block_id} was evicted, but it had no block_hash"
        self.removed.append(block.block_id)


def ids(blocks: list[KVCacheBlock]) -> list[int]:
    return [block.block_id for block in blocks]


def free_ids(pool: BlockPool) -> list[int]:
    """Returns the ids of the free blocks, the one that is used next first."""
    return ids(pool.free_block_queue.get_all_free_blocks())


def counts(pool: BlockPool) -> dict[int, int]:
    return {block.block_id: block.ref_cnt for block in pool.blocks}


# ---- get_new_blocks


@check("unit", spec="R3.1", hint=2)
def blocks_come_from_the_head(mine: Mine) -> None:
    """New blocks are the first ones of the free queue, in its order, and each has one holder."""
    pool = mine.cls(6)
    blocks = pool.get_new_blocks(3)
    assert ids(blocks) == [1, 2, 3], f"the queue was 1 2 3 4 5, and get_new_blocks(3) returned {ids(blocks)}"
    assert free_ids(pool) == [4, 5], f"after get_new_blocks(3) the queue is {free_ids(pool)}, expected [4, 5]"
    held = {block.block_id: block.ref_cnt for block in blocks}
    assert held == {1: 1, 2: 1, 3: 1}, f"the ref_cnt of the new blocks is {held}, expected 1 for each"


@check("unit", spec="R3.1", hint=1)
def no_blocks_are_an_empty_list(mine: Mine) -> None:
    """Zero blocks can always be had, also from an empty pool. The scheduler asks for them in most decode steps."""
    pool = mine.cls(3)
    pool.get_new_blocks(2)
    got = pool.get_new_blocks(0)
    assert got == [], f"get_new_blocks(0) with 0 free returned {got}, expected an empty list"


@check("unit", spec="R3.3", hint=1)
def out_of_blocks_changes_nothing(mine: Mine) -> None:
    """If too few blocks are free, an allocation raises ValueError and takes none."""
    index = Index()
    pool = mine.cls(5, prefix_index=index)
    blocks = pool.get_new_blocks(4)
    blocks[0].block_hash = b"a cached prefix"
    pool.free_blocks(blocks[:2])
    queue, before = free_ids(pool), counts(pool)
    try:
        pool.get_new_blocks(3)
    except ValueError:
        pass
    else:
        raise AssertionError("get_new_blocks(3) with 2 free returned something, expected ValueError")
    n = pool.get_num_free_blocks()
    assert n == 2, f"get_new_blocks(3) with 2 free left {n} free, expected 2: blocks were taken before the check"
    assert free_ids(pool) == queue, f"a failed allocation left the queue {free_ids(pool)}, before it was {queue}"
    assert counts(pool) == before, f"a failed allocation left the counts {counts(pool)}, before they were {before}"
    assert not index.removed, (
        f"a failed allocation evicted the blocks {index.removed}: their prefix is lost for nothing"
    )


@check("unit", spec="R3.8", hint=3)
def a_cached_block_is_evicted_before_it_is_reused(mine: Mine) -> None:
    """A block with a hash is forgotten by the prefix index when it is handed out, and not earlier."""
    index = Index()
    pool = mine.cls(4, prefix_index=index)
    (first, *_) = blocks = pool.get_new_blocks(3)
    first.block_hash = b"a cached prefix"
    pool.free_blocks(blocks[::-1])  # the queue is 3 2 1: a block without a hash is reused first
    assert first.block_hash is not None, "free_blocks took the hash of block 1: a free block can still be hit"
    pool.get_new_blocks(2)
    assert not index.removed, f"blocks 3 and 2 were handed out, but {index.removed} were evicted"
    pool.get_new_blocks(1)
    evicted = index.removed == [1] and first.block_hash is None
    assert evicted, "block 1 has a new holder, but the prefix index still serves it under its old name"
    n = pool.num_free_cached_blocks
    assert n == 0, f"no block is free, but num_free_cached_blocks is {n}: evict each cached block once"


# ---- free_blocks


@check("unit", spec="R3.8", hint=1)
def a_shared_block_stays_with_its_other_holder(mine: Mine) -> None:
    """A block that two requests hold becomes free when the second one gives it back."""
    pool = mine.cls(4)
    blocks = pool.get_new_blocks(2)
    pool.touch(blocks[:1])  # a second request holds block 1
    pool.free_blocks(blocks[::-1])
    assert 1 not in free_ids(pool), f"one of two holders freed block 1, and it is in the queue {free_ids(pool)}"
    assert blocks[0].ref_cnt == 1, f"one of two holders freed block 1, and its ref_cnt is {blocks[0].ref_cnt}"
    pool.free_blocks(blocks[:1])
    assert 1 in free_ids(pool), f"both holders freed block 1, and it is not in the queue {free_ids(pool)}: it is lost"


@check("unit", spec="R3.6", hint=2)
def freed_blocks_are_reused_in_the_given_order(mine: Mine) -> None:
    """The first block that free_blocks is given is the first that is handed out again."""
    pool = mine.cls(6)
    blocks = pool.get_new_blocks(3)
    pool.free_blocks(blocks[::-1])
    queue = free_ids(pool)
    assert queue == [3, 2, 1, 4, 5], (
        f"after free_blocks of 3, 2, 1 the queue is {queue}, expected [3, 2, 1, 4, 5]: the end of a sequence must be "
        "reused before its beginning, which other requests may share"
    )


@check("unit", spec="R3.7", hint=3)
def the_null_block_is_passed_over(mine: Mine) -> None:
    """Block 0 pads tables, so it is given to free_blocks again and again. It never becomes free."""
    pool = mine.cls(3)
    (block,) = pool.get_new_blocks(1)
    pool.free_blocks([pool.null_block, block, pool.null_block])
    assert 0 not in free_ids(pool), f"the null block is in the free queue {free_ids(pool)}: it will be overwritten"
    n = pool.null_block.ref_cnt
    assert n == 0, f"free_blocks changed the ref_cnt of the null block to {n}; nothing counts its holders"


@check("unit", spec="R3.1", hint=3)
def a_second_free_is_refused(mine: Mine) -> None:
    """A block that is freed twice would be handed to two requests, so the second time raises AssertionError."""
    pool = mine.cls(4)
    blocks = pool.get_new_blocks(1)
    pool.free_blocks(blocks)
    try:
        pool.free_blocks(blocks)
    except AssertionError:
        pass
    else:
        raise AssertionError(
            f"block 1 was freed twice without an error; the queue is now {free_ids(pool)}, and the request that really "
            "holds a block would lose it the next time"
        )
    assert free_ids(pool).count(1) == 1, f"the refused free changed the queue to {free_ids(pool)}"


# ---- both


@check("property", spec="R3.1", hint=1)
def blocks_are_conserved(mine: Mine) -> None:
    """Whatever requests do, every block is free or held, never both, and no block is lost or handed out twice."""
    for seed in range(150):
        num_blocks = 3 + seed // 15
        run_random_life(mine.cls(num_blocks, free_uncached_first=seed % 2 == 0), random.Random(seed), 4 + seed // 3)


def run_random_life(pool: Any, rng: random.Random, num_steps: int) -> None:
    """Takes, shares and frees blocks at random. After each step, compares the pool with the tables of all holders."""
    tables: list[list[KVCacheBlock]] = []
    story = [f"{pool.num_blocks - 1} usable blocks"]
    for _ in range(num_steps):
        action = rng.choice(("take", "take", "share", "free", "free"))
        if action == "take":
            n, num_free = rng.randint(0, 3), pool.get_num_free_blocks()
            story.append(f"get_new_blocks({n})")
            try:
                tables.append(pool.get_new_blocks(n))
            except ValueError:
                assert n > num_free, f"{'; '.join(story)}: ValueError although {num_free} were free"
        elif action == "share" and tables:
            shared = rng.choice(tables)
            story.append(f"touch({ids(shared)})")
            pool.touch(shared)
            tables.append(list(shared))
        elif action == "free" and tables:
            table = tables.pop(rng.randrange(len(tables)))[::-1]
            story.append(f"free_blocks({ids(table)})")
            pool.free_blocks(table)
        compare(pool, tables, "; ".join(story))


def compare(pool: Any, tables: list[list[KVCacheBlock]], story: str) -> None:
    free, held = free_ids(pool), {block.block_id for table in tables for block in table}
    assert not held & set(free), f"{story}: blocks {sorted(held & set(free))} are free and held"
    lost = set(range(1, pool.num_blocks)) - held - set(free)
    assert not lost, f"{story}: blocks {sorted(lost)} are neither free nor held: they are lost"
    assert 0 not in held, f"{story}: the null block was handed out"
    for block in pool.blocks[1:]:
        holders = sum(table.count(block) for table in tables)
        assert block.ref_cnt == holders, (
            f"{story}: block {block.block_id} has ref_cnt {block.ref_cnt}, and {holders} requests hold it"
        )


@check("counters", spec="R3.1", hint=2)
def the_queue_is_not_walked(mine: Mine) -> None:
    """A step takes a few blocks of many. It may not look at all that are free: that would take longer than the step."""
    pool = mine.cls(1000)
    removed: list[int] = []
    queue, remove = pool.free_block_queue, pool.free_block_queue.remove

    def walked() -> list[KVCacheBlock]:
        raise AssertionError("get_all_free_blocks was called: it looks at every free block, and is for tests only")

    def count_and_remove(block: KVCacheBlock) -> None:
        removed.append(block.block_id)
        remove(block)

    queue.get_all_free_blocks, queue.remove = walked, count_and_remove
    pool.free_blocks(pool.get_new_blocks(3))
    assert len(removed) <= 3, f"{len(removed)} blocks left the queue for get_new_blocks(3), expected 3"
