"""BlockPool: the null block, reference counts, the order of freed blocks (R1.8, R1.9)."""

import pytest

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import NullPrefixIndex

pytestmark = pytest.mark.m1


class RecordingIndex(NullPrefixIndex):
    """Remembers which blocks it was told to forget, and with which hash they came."""

    def __init__(self) -> None:
        self.removed: list[tuple[int, bytes | None]] = []

    def remove(self, block: KVCacheBlock) -> None:
        self.removed.append((block.block_id, block.block_hash))


def free_ids(pool: BlockPool) -> list[int]:
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


def take(pool: BlockPool, n: int, hashed: tuple[int, ...] = ()) -> list[KVCacheBlock]:
    """n new blocks, those with the ids in `hashed` published."""
    blocks = pool.get_new_blocks(n)
    for block in blocks:
        if block.block_id in hashed:
            block.block_hash = b"hash of %d" % block.block_id
    return blocks


def test_block_0_is_the_null_block_and_is_never_handed_out() -> None:
    pool = BlockPool(4)
    assert pool.null_block.block_id == 0 and pool.null_block.is_null
    assert pool.get_num_free_blocks() == 3
    assert [block.block_id for block in pool.get_new_blocks(3)] == [1, 2, 3]


def test_a_pool_needs_more_than_the_null_block() -> None:
    with pytest.raises(AssertionError):
        BlockPool(1)


def test_the_null_block_cannot_be_freed_or_taken_by_touch() -> None:
    pool = BlockPool(3)
    pool.touch([pool.null_block])
    pool.free_blocks([pool.null_block, pool.null_block])
    assert free_ids(pool) == [1, 2]
    pool.check_integrity([[pool.null_block]])


def test_usage_counts_usable_blocks_only() -> None:
    pool = BlockPool(5)
    assert pool.usage == 0.0
    blocks = pool.get_new_blocks(1)
    assert pool.usage == 0.25
    blocks += pool.get_new_blocks(3)
    assert pool.usage == 1.0 and all(block.ref_cnt == 1 for block in blocks)
    pool.free_blocks(blocks)
    assert pool.usage == 0.0 and all(block.ref_cnt == 0 for block in blocks)


def test_too_many_blocks_asked_for_takes_nothing() -> None:
    pool = BlockPool(4)
    pool.get_new_blocks(1)
    with pytest.raises(ValueError, match="Cannot get 3 free blocks from the pool, it has 2"):
        pool.get_new_blocks(3)
    assert free_ids(pool) == [2, 3]
    assert [block.ref_cnt for block in pool.blocks[1:]] == [1, 0, 0]


def test_freed_twice_is_our_bug() -> None:
    pool = BlockPool(3)
    (block,) = pool.get_new_blocks(1)
    pool.free_blocks([block])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free_blocks([block])
    assert block.ref_cnt == 0 and pool.get_num_free_blocks() == 2


def test_unhashed_blocks_go_to_the_head_in_the_given_order() -> None:
    pool = BlockPool(6)  # 1..5
    blocks = take(pool, 3)
    pool.free_blocks(blocks[::-1])
    assert free_ids(pool) == [3, 2, 1, 4, 5]


def test_without_free_uncached_first_all_go_to_the_tail() -> None:
    pool = BlockPool(6, free_uncached_first=False)
    blocks = take(pool, 3, hashed=(2,))
    pool.free_blocks(blocks[::-1])
    assert free_ids(pool) == [4, 5, 3, 2, 1]


def test_hashed_blocks_go_to_the_tail_unhashed_to_the_head() -> None:
    pool = BlockPool(8)  # 1..7
    blocks = take(pool, 4, hashed=(1, 2))
    pool.free_blocks(blocks[::-1])  # 4 3 unhashed, 2 1 hashed
    assert free_ids(pool) == [4, 3, 5, 6, 7, 2, 1]


def test_a_freed_block_keeps_its_hash_until_it_is_taken_again() -> None:
    index = RecordingIndex()
    pool = BlockPool(3, prefix_index=index)
    blocks = take(pool, 2, hashed=(1,))
    pool.free_blocks(blocks)
    assert blocks[0].block_hash == b"hash of 1" and index.removed == []
    assert [block.block_id for block in pool.get_new_blocks(1)] == [2]
    assert index.removed == []
    assert [block.block_id for block in pool.get_new_blocks(1)] == [1]
    assert index.removed == [(1, b"hash of 1")], "the index is told while the block still knows its hash"
    assert blocks[0].block_hash is None


def test_touch_of_a_held_block_only_counts() -> None:
    pool = BlockPool(3)
    (block,) = pool.get_new_blocks(1)
    pool.touch([block])
    assert block.ref_cnt == 2 and free_ids(pool) == [2]
    pool.check_integrity([[block], [block]])
    pool.free_blocks([block])
    assert block.ref_cnt == 1 and free_ids(pool) == [2], "somebody still holds it"
    pool.free_blocks([block])
    assert free_ids(pool) == [1, 2]


def test_touch_of_a_free_block_takes_it_out_of_the_queue() -> None:
    pool = BlockPool(5)
    blocks = take(pool, 2, hashed=(1, 2))
    pool.free_blocks(blocks[::-1])
    assert free_ids(pool) == [3, 4, 2, 1]
    pool.touch([blocks[1]])
    assert blocks[1].ref_cnt == 1 and blocks[1].block_hash is not None
    assert free_ids(pool) == [3, 4, 1]


@pytest.mark.parametrize("breakage", ["lost", "both", "count", "unknown holder"])
def test_check_integrity_notices(breakage: str) -> None:
    pool = BlockPool(4)
    blocks = pool.get_new_blocks(2)
    tables = [blocks[:1], blocks[1:]]
    pool.check_integrity(tables)
    if breakage == "lost":
        tables.pop()
    elif breakage == "both":
        pool.free_block_queue.append(blocks[0])
    elif breakage == "count":
        blocks[0].ref_cnt = 2
    else:
        tables.append(blocks[1:])
    with pytest.raises(AssertionError):
        pool.check_integrity(tables)
