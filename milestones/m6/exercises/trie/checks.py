"""The checks of m6/trie: an index of your class, a shelf of blocks, and the hash index to compare with."""

import random
from typing import Any

from folovllm.core.prefix_index import HashPrefixIndex
from folovllm.core.prefix_trie import TriePrefixIndex
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_index import Shelf

A, B, C = [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]


def prediction() -> str:
    shelf = Shelf(TriePrefixIndex)
    shelf.compute(A + B + C)
    shelf.evict(2)
    before = shelf.hits([*A, *B, *C, 0])
    shelf.compute(A + B, hits=[1])
    after = shelf.hits([*A, *B, *C, 0])
    assert (before, after) == ([1], [1, 4, 3]), "the example of the page"
    return f"{len(before)} and then {len(after)}: what lies behind the gap came back"


@check("unit", spec="R6.5", hint=2)
def the_longest_prefix_is_found(mine: Mine) -> None:
    """The hit is the longest known beginning, and ends where the tree has no child with the tokens of the request."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B + C)  # in the blocks 1, 2, 3
    for tokens, expected in (
        ([*A, *B, *C, 0], [1, 2, 3]),
        ([*A, *B, 0, 0, 0, 0, 0], [1, 2]),
        ([*A, *C, 0], [1]),
        ([*B, *C, 0], []),
        ([0, *A, *B], []),
    ):
        got = shelf.hits(tokens)
        assert got == expected, f"{A + B + C} is in the blocks 1, 2, 3; {tokens} hits {got}, expected {expected}"


@check("unit", spec="R6.5", hint=1)
def one_token_is_left_to_compute(mine: Mine) -> None:
    """Also if a whole prompt is known, its last token is computed: logits are not cached."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B)
    for tokens, expected in ((A, []), (A + B, [1]), ([*A, *B, 0], [1, 2])):
        got = shelf.hits(tokens)
        assert got == expected, (
            f"{A + B} is in the blocks 1, 2; a prompt of {len(tokens)} tokens hits {got}, expected {expected}: a hit "
            "of all tokens leaves no query to sample from"
        )


@check("unit", spec="R6.2", hint=2)
def salts_do_not_meet(mine: Mine) -> None:
    """Each salt has a root of its own, so a request never hits a block of another salt."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B, salt="mine")
    got = shelf.hits([*A, *B, 0], "yours") + shelf.hits([*A, *B, 0])
    assert got == [], f"{A + B} was computed with the salt 'mine'; other salts hit {got}, expected nothing"
    got = shelf.hits([*A, *B, 0], "mine")
    assert got == [1, 2], f"{A + B} was computed with the salt 'mine'; the same salt hits {got}, expected [1, 2]"


@check("unit", spec="R6.5", hint=3)
def an_evicted_block_is_no_hit(mine: Mine) -> None:
    """A block that was removed is never hit again under its old tokens: it holds others by now."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B + C)
    shelf.evict(2)
    got = shelf.hits([*A, *B, *C, 0])
    assert 2 not in got, f"block 2 was evicted, and the hit is {got}: the tree names a block that holds other tokens"
    assert got == [1], f"the blocks 1 and 3 of [1, 2, 3] are left; the hit is {got}, expected [1]: it ends at the gap"


@check("unit", spec="R6.5", hint=2)
def equal_blocks_are_all_kept(mine: Mine) -> None:
    """Two requests may compute the same prefix. The first block is hit, and when it goes, the other takes over."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B)  # 1, 2
    shelf.compute(A + B)  # 3, 4, by a request that did not look
    shelf.check_integrity("the same prefix in 1, 2 and in 3, 4")
    got = shelf.hits([*A, *B, 0])
    assert got == [1, 2], f"{A + B} is in 1, 2 and again in 3, 4; the hit is {got}, expected [1, 2]"
    shelf.evict(1)
    got = shelf.hits([*A, *B, 0])
    assert got == [3, 2], f"block 1 was evicted, block 3 holds the same; the hit is {got}, expected [3, 2]"
    shelf.index.insert(shelf.request(C), [shelf.blocks[9]], 1)
    shelf.index.insert(shelf.request(C), [shelf.blocks[8]], 1)
    got = shelf.hits([*C, 0])
    assert got == [9], f"{C} was published in block 9 and then in block 8; the hit is {got}, expected [9], the first"


@check("unit", spec="R6.6", hint=1)
def what_lies_behind_a_gap_comes_back(mine: Mine) -> None:
    """A node without a block stays while one below it has one. Computed again, it makes the rest reachable."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B + C)
    shelf.evict(2)
    shelf.check_integrity("[1, 2, 3], and 2 evicted")
    shelf.compute(A + B, hits=[1])  # block 2's tokens, now in block 4
    got = shelf.hits([*A, *B, *C, 0])
    assert got == [1, 4, 3], (
        f"block 4 has taken the place of block 2; the hit is {got}, expected [1, 4, 3]: block 3 was in memory all the "
        "time, and the hash index finds it"
    )


@check("unit", spec="R6.5", hint=2)
def publishing_goes_on_where_it_ended(mine: Mine) -> None:
    """A running request publishes its new block behind the old ones, which are published already."""
    shelf = Shelf(mine.cls)
    request, table = shelf.request(A + B + C), shelf.blocks[1:4]
    for n in (1, 1, 3):
        shelf.index.insert(request, table, n)
        shelf.check_integrity(f"insert of the first {n} blocks")
    got = shelf.hits([*A, *B, *C, 0])
    assert got == [1, 2, 3], f"blocks 1, then 2 and 3 were published; the hit is {got}, expected [1, 2, 3]"


@check("unit", spec="R6.6", hint=3)
def a_root_comes_with_its_first_child(mine: Mine) -> None:
    """If a request has no full block to publish, the tree does not change."""
    shelf = Shelf(mine.cls)
    shelf.index.insert(shelf.request([*A, 0]), shelf.blocks[1:3], 0)
    assert not shelf.index.roots, (
        f"insert of 0 blocks made {len(shelf.index.roots)} root, expected none: a root without a child leads nowhere, "
        "no eviction removes it, and with a salt per user there is one more for every user"
    )


@check("unit", spec="R6.6", hint=3)
def nothing_is_left_of_what_is_gone(mine: Mine) -> None:
    """A node that leads to no block goes, and so do the nodes above that led only to it. An empty tree has no root."""
    shelf = Shelf(mine.cls)
    blocks = shelf.compute(A + B + C) + shelf.compute(A + C, salt="s") + shelf.compute([*A, *B])
    for block_id in random.Random(0).sample(blocks, len(blocks)):
        shelf.evict(block_id)
        shelf.check_integrity(f"after the eviction of block {block_id}")
    left = len(shelf.index.roots) + len(shelf.index.node_of)
    assert left == 0, (
        f"all blocks are gone, and {len(shelf.index.roots)} roots and {len(shelf.index.node_of)} entries of node_of "
        "are left: an engine that runs for weeks fills its memory with them"
    )


@check("property", spec="R6.6", hint=1)
def the_same_hits_as_the_hash_index(mine: Mine) -> None:
    """Random requests and evictions: the tree finds block for block what the hash index finds."""
    for seed in range(60):
        run_random_life(Shelf(mine.cls), Shelf(HashPrefixIndex), random.Random(seed), 3 + seed // 3)


def run_random_life(shelf: Shelf, other: Shelf, rng: random.Random, num_steps: int) -> None:
    story, published = [], set()
    for _ in range(num_steps):
        if published and rng.random() < 0.3:
            block_id = rng.choice(sorted(published))
            story.append(f"evict {block_id}")
            shelf.evict(block_id)
            other.evict(block_id)
            published.discard(block_id)
        else:
            tokens = [token for _ in range(rng.randint(1, 3)) for token in rng.choice((A, B))] + [0] * rng.randint(0, 1)
            salt = rng.choice((None, None, "s"))
            story.append(f"compute {tokens}" + (f" with salt {salt}" if salt else ""))
            got, expected = shelf.hits(tokens, salt), other.hits(tokens, salt)
            assert got == expected, f"{'; '.join(story)}: the tree hits {got}, the hash index {expected}"
            published |= set(shelf.compute(tokens, salt, hits=got))
            other.compute(tokens, salt, hits=expected)
        shelf.check_integrity("; ".join(story))


@check("counters", spec="R6.5", hint=2)
def a_decode_step_walks_one_step(mine: Mine) -> None:
    """A request of 100 blocks that fills one more goes on at its last node, and does not walk down from the root."""
    shelf = Shelf(mine.cls)
    tokens = list(range(400))
    shelf.compute(tokens)
    request = shelf.request([*tokens, *A])
    request.block_tokens = reads = CountingList(request.block_tokens)
    shelf.index.insert(request, shelf.blocks[1:102], 101)
    assert reads.num_reads <= 3, (
        f"100 blocks were published, and one is new: insert read the tokens of {reads.num_reads} blocks, expected 1"
    )


class CountingList(list[bytes]):
    num_reads = 0

    def __getitem__(self, key: Any) -> Any:
        self.num_reads += 1
        return super().__getitem__(key)
