"""The checks of m3/allocate_slots: a manager of your class on the reference's block pool."""

import random
from typing import Any

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import NullPrefixIndex
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import make_request
from folovllm.request import Request


def prediction() -> str:
    """Runs the steps of `predict` on the reference."""
    manager = make_manager(KVCacheManager)
    r, new = make_request("r", 6), []
    for num_new_tokens in (6, 1, 1, 1):
        new.append(len(grow(manager, r, num_new_tokens) or []))
        if len(new) == 1:
            answer = manager.allocate_slots(make_request("s", 9), 9)
    return (
        f"r gets {new} new blocks\nWhere its last block has room, the answer is an empty list. Request s, which wants "
        f"9 tokens after step 1, gets {answer}: it needs 3 blocks, and 2 are free."
    )


class Index(NullPrefixIndex):
    """A prefix index that remembers how many full blocks each request published."""

    def __init__(self) -> None:
        self.published: list[int] = []

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        self.published.append(num_full_blocks)


def make_manager(cls: Any, num_blocks: int = 5, block_size: int = 4, max_model_len: int = 16) -> Any:
    return cls(block_size, max_model_len, BlockPool(num_blocks, Index()))


def ids(blocks: Any) -> list[int] | None:
    return None if blocks is None else [block.block_id for block in blocks]


def free_ids(manager: Any) -> list[int]:
    """Returns the ids of the free blocks, the one that is used next first."""
    return [block.block_id for block in manager.block_pool.free_block_queue.get_all_free_blocks()]


def table_of(manager: Any, request: Request) -> list[int]:
    return manager.get_block_ids(request.request_id)[0]


def grow(manager: Any, request: Request, num_new_tokens: int, **args: Any) -> list[KVCacheBlock] | None:
    """Allocates and, if that succeeded, counts the tokens as computed, as the scheduler does."""
    while request.num_tokens < request.num_computed_tokens + num_new_tokens:
        request.append_output_token_id(1)
    blocks = manager.allocate_slots(request, num_new_tokens, **args)
    if blocks is not None:
        request.num_computed_tokens += num_new_tokens
    return blocks


def cached_blocks(manager: Any, n: int) -> list[KVCacheBlock]:
    """Returns n free blocks that a prefix hit may name: published, computed and given back by an earlier request."""
    blocks = manager.block_pool.get_new_blocks(n)
    for block in blocks:
        block.block_hash = b"prefix %d" % block.block_id
    manager.block_pool.free_blocks(blocks[::-1])
    return blocks


@check("unit", spec="R3.4", hint=3)
def no_new_block_is_success(mine: Mine) -> None:
    """If the tokens fit into blocks that the request has, the answer is an empty list, even if no block is free."""
    manager = make_manager(mine.cls, num_blocks=3)
    request = make_request("r", 6)
    grow(manager, request, 6)
    answer = grow(manager, request, 1)
    assert answer == [], (
        f"6 tokens hold 2 blocks of 4; for one more token allocate_slots answered {answer}, expected []: the scheduler "
        "takes None for failure, and preempts a request"
    )


@check("unit", spec="R3.2", hint=1)
def a_block_is_taken_when_a_token_needs_it(mine: Mine) -> None:
    """A request gets a new block for the first token that has no slot: at positions 0, 4, 8, ... in blocks of 4."""
    for block_size in (4, 5, 2, 1):
        manager = make_manager(mine.cls, num_blocks=20, block_size=block_size)
        request = make_request("r", 1)
        for position in range(12):
            blocks = grow(manager, request, 1)
            assert blocks is not None, f"None at position {position} although blocks are free"
            expected = 1 if position % block_size == 0 else 0
            assert len(blocks) == expected, (
                f"blocks of {block_size}: for the token at position {position} allocate_slots took {len(blocks)} "
                f"blocks, expected {expected}; the table then is {table_of(manager, request)}"
            )


@check("unit", spec="R3.9", hint=2)
def a_free_hit_costs_a_block(mine: Mine) -> None:
    """A hit that no request holds is in the free queue, so it costs a free block; one that is held does not."""
    manager = make_manager(mine.cls)  # 4 usable blocks
    hits = cached_blocks(manager, 2)
    assert not manager.fits(20, 2, hits), "20 slots, 2 hits that are free, 4 free: 2 + 3 new > 4, but fits said yes"
    assert manager.fits(16, 2, hits), "16 slots, 2 hits that are free, 4 free: 2 + 2 new = 4, but fits said no"
    manager.block_pool.touch(hits)
    assert manager.fits(16, 2, hits), "16 slots, 2 hits that are held, 2 free: 2 new blocks fit, but fits said no"


@check("unit", spec="R3.3", hint=1)
def failure_changes_nothing(mine: Mine) -> None:
    """If the blocks do not fit, the answer is None, and pool, tables and counts are as before."""
    manager = make_manager(mine.cls, num_blocks=6)
    hits = cached_blocks(manager, 2)
    grow(manager, make_request("other", 7), 7)
    queue, s = free_ids(manager), make_request("s", 16)
    answer = manager.allocate_slots(s, 8, hits)
    assert answer is None, (
        f"2 hits that are free and 2 new blocks of {len(queue)} free: answered {ids(answer)}, not None"
    )
    touched = [block.block_id for block in hits if block.ref_cnt]
    assert not touched, f"a refused request holds its hits {touched}: they were touched before the check, and leak"
    assert free_ids(manager) == queue, f"a refused request changed the free queue from {queue} to {free_ids(manager)}"
    assert "s" not in manager.req_to_blocks, "a refused request has a block table: check before you make one"


@check("unit", spec="R3.9", hint=3)
def hits_begin_the_table(mine: Mine) -> None:
    """The hits are the first blocks of the table and have one more holder. Only the other blocks are new."""
    manager = make_manager(mine.cls, num_blocks=8)
    hits = cached_blocks(manager, 2)
    request = make_request("r", 11)
    new = manager.allocate_slots(request, 3, hits)
    assert len(new or []) == 1, f"11 tokens, 8 of them hit, blocks of 4: answered {ids(new)}, expected one new block"
    expected = [*ids(hits), *ids(new)]
    assert table_of(manager, request) == expected, f"the table is {table_of(manager, request)}, expected {expected}"
    counts = [block.ref_cnt for block in hits]
    assert counts == [1, 1], f"the ref_cnt of the hits is {counts}, expected 1 each: this request holds them"


@check("unit", spec="R3.9", hint=3)
def a_hit_in_part_is_copied(mine: Mine) -> None:
    """If the hit tokens end inside a block, that block is not in the table: it is copied into the first new block."""
    manager = make_manager(mine.cls, num_blocks=8)
    whole, part = hits = cached_blocks(manager, 2)
    request = make_request("r", 11)
    new = manager.allocate_slots(request, 5, hits, num_new_computed_tokens=6)
    assert len(new or []) == 2, f"6 of 11 tokens hit, one block of 4 shared: answered {ids(new)}, expected 2 new blocks"
    assert table_of(manager, request) == [whole.block_id, *ids(new)], (
        f"the table is {table_of(manager, request)}: block {part.block_id} holds other tokens at its end, and the "
        "request would write over them"
    )
    copies = manager.take_block_copies()
    assert copies == [(part.block_id, new[0].block_id)], f"copies are {copies}: the 2 tokens hit in part are not there"


@check("unit", spec="R3.11", hint=1)
def the_whole_sequence_must_fit_if_asked(mine: Mine) -> None:
    """With full_sequence_must_fit a chunk is refused if the rest would not fit; blocks are taken for the chunk."""
    manager = make_manager(mine.cls, num_blocks=4)  # 12 slots
    answer = manager.allocate_slots(make_request("long", 13), 4, full_sequence_must_fit=True)
    assert answer is None, "13 known tokens, 12 slots: the first chunk was admitted, and the rest can never follow"
    answer = manager.allocate_slots(make_request("short", 12), 4, full_sequence_must_fit=True)
    assert answer is not None and len(answer) == 1, (
        f"12 known tokens, 12 slots, a chunk of 4: answered {ids(answer)}, expected one block: the check is for the "
        "whole sequence, the blocks are for this step"
    )


@check("unit", spec="R3.2", hint=2)
def never_beyond_max_model_len(mine: Mine) -> None:
    """A request has at most max_model_len slots. The worker's block table has no column for more."""
    manager = make_manager(mine.cls, num_blocks=9, max_model_len=10)
    request = make_request("r", 8)
    grow(manager, request, 8)
    manager.allocate_slots(request, 5)  # drafts may reach past the end
    n = len(table_of(manager, request))
    assert n == 3, f"max_model_len 10, blocks of 4: the table has {n} blocks, expected 3"


@check("unit", spec="R3.2", hint=1)
def nothing_to_allocate_is_an_error(mine: Mine) -> None:
    """The scheduler never asks for zero tokens, so a count below 1 is a mistake of the caller: ValueError."""
    for n in (0, -1):
        try:
            make_manager(mine.cls).allocate_slots(make_request("r", 6), n)
        except ValueError:
            continue
        raise AssertionError(f"allocate_slots of {n} tokens raised no ValueError: a wrong count stays unnoticed")


@check("unit", spec="R3.10", hint=3)
def full_blocks_of_known_tokens_are_published(mine: Mine) -> None:
    """Only blocks that this step fills with known tokens get a name: a slot without K and V must never be hit."""
    manager = make_manager(mine.cls, num_blocks=9)
    request = make_request("r", 10)
    manager.allocate_slots(request, 7)
    published = manager.block_pool.prefix_index.published
    assert published == [1], f"7 tokens in blocks of 4 fill one block, but published were the first {published}"
    request.num_computed_tokens = 7
    manager.allocate_slots(request, 6)  # 13 slots, of which 10 are for known tokens
    assert published == [1, 2], f"10 known tokens fill 2 blocks of 4, but published were the first {published}"


@check("unit", spec="R3.6", hint=2)
def blocks_return_in_reverse(mine: Mine) -> None:
    """free gives the last block back first, and a request that holds nothing is no error."""
    manager = make_manager(mine.cls)
    request = make_request("r", 9)
    grow(manager, request, 9)
    manager.free(request)
    assert free_ids(manager) == [3, 2, 1, 4], f"the table was [1, 2, 3]; after free the queue is {free_ids(manager)}"
    manager.free(request)
    assert free_ids(manager) == [3, 2, 1, 4], f"a second free changed the queue to {free_ids(manager)}"
    assert not manager.req_to_blocks, f"the request is gone, and its table is still there: {manager.req_to_blocks}"


@check("property", spec="R3.3", hint=1)
def requests_hold_what_they_need(mine: Mine) -> None:
    """Whatever requests do, each table has as many blocks as its tokens need, and a refusal changes nothing."""
    for seed in range(120):
        rng = random.Random(seed)
        block_size = rng.randint(1, 5)
        manager = make_manager(mine.cls, 2 + -(-12 // block_size) + rng.randrange(4), block_size, max_model_len=12)
        run_random_life(manager, rng, 3 + seed // 4)


def run_random_life(manager: Any, rng: random.Random, num_steps: int) -> None:
    """Requests come, grow and leave. Compares tables and free blocks with a count of its own after each step."""
    requests: list[Request] = []
    story = [f"blocks of {manager.block_size}, {manager.block_pool.num_blocks - 1} usable"]
    for step in range(num_steps):
        if requests and rng.random() < 0.2:
            request = requests.pop(rng.randrange(len(requests)))
            story.append(f"free({request.request_id})")
            manager.free(request)
        elif requests and rng.random() < 0.6:
            grow_and_compare(manager, rng.choice(requests), 1, story)
        else:
            request = make_request(f"r{step}", rng.randint(1, 9))
            if grow_and_compare(manager, request, rng.randint(1, request.num_tokens), story):
                requests.append(request)
        tables = manager.req_to_blocks
        known = {request.request_id for request in requests}
        assert set(tables) == known, f"{'; '.join(story)}: tables of {sorted(tables)}, but {sorted(known)} hold blocks"
        for request in requests:
            needed, n = -(-request.num_computed_tokens // manager.block_size), len(tables[request.request_id])
            assert n == needed, f"{'; '.join(story)}: {request.request_id} has {n} blocks, its tokens need {needed}"
        manager.check_integrity()


def grow_and_compare(manager: Any, request: Request, num_new_tokens: int, story: list[str]) -> bool:
    if request.num_computed_tokens + num_new_tokens > manager.max_model_len:
        return True
    story.append(f"allocate_slots({request.request_id}, {num_new_tokens})")
    owned, free = len(table_of(manager, request)), manager.block_pool.get_num_free_blocks()
    slots = request.num_computed_tokens + num_new_tokens
    needed = -(-slots // manager.block_size) - owned
    answer = grow(manager, request, num_new_tokens)
    if needed > free:
        assert answer is None, f"{'; '.join(story)}: {needed} blocks needed, {free} free, answered {ids(answer)}"
        left = manager.block_pool.get_num_free_blocks()
        assert left == free, f"{'; '.join(story)}: refused, and {left} blocks are free, before {free}"
        return False
    assert answer is not None and len(answer) == needed, (
        f"{'; '.join(story)}: answered {ids(answer)}, expected {needed} new blocks"
    )
    return True
