"""The checks of m6/longest_hit: an index of your class, and a shelf of blocks that requests fill in turn."""

import random
from typing import Any

from folovllm.core.prefix_index import HashPrefixIndex
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_index import Shelf

A, B, C = [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]


def prediction() -> str:
    shelf = Shelf(HashPrefixIndex)
    shelf.compute(A + B + C)
    same, longer = (4 * len(shelf.hits(tokens)) for tokens in (A + B + C, [*A, *B, *C, 0]))
    return f"{same} and {longer}: the last token is always computed, and with it its block"


@check("unit", spec="R6.5", hint=2)
def the_longest_prefix_is_found(mine: Mine) -> None:
    """The hit is the longest known beginning, and ends at the first block that is not known."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B + C)  # in the blocks 1, 2, 3
    for tokens, expected in (
        ([*A, *B, *C, 0], [1, 2, 3]),
        ([*A, *B, 0, 0, 0, 0, 0], [1, 2]),
        ([*A, *C, 0], [1]),
        ([0, *A, *B], []),
    ):
        got = shelf.hits(tokens)
        assert got == expected, f"{A + B + C} is in the blocks 1, 2, 3; {tokens} hits {got}, expected {expected}"


@check("unit", spec="R6.5", hint=3)
def one_token_is_left_to_compute(mine: Mine) -> None:
    """Also if a whole prompt is known, its last token is computed: logits are not cached."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B)
    for tokens, expected in ((A, []), (A + B, [1]), ([*A, *B, 0], [1, 2])):
        got = shelf.hits(tokens)
        assert got == expected, (
            f"{A + B} is in the blocks 1, 2; a prompt of {len(tokens)} tokens hits {got}, expected {expected}: a hit "
            f"of all {len(tokens)} tokens leaves a query of no token, and no logits to sample from"
        )


@check("unit", spec="R6.5", hint=1)
def known_tokens_behind_another_prefix_are_no_hit(mine: Mine) -> None:
    """A block is hit only behind the prefix that it was computed behind."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B)
    got = shelf.hits([*B, 0]) + shelf.hits([*C, *B, 0])
    assert got == [], f"{B} was computed behind {A}; a request with another beginning hits {got}, expected nothing"


@check("unit", spec="R6.5", hint=1)
def a_gap_ends_the_hit(mine: Mine) -> None:
    """If a block in the middle is evicted, those behind it are no hit, until it is computed again."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B + C)
    shelf.evict(2)
    got = shelf.hits([*A, *B, *C, 0])
    assert got == [1], (
        f"the blocks 1 and 3 of [1, 2, 3] are left; the hit is {got}, expected [1]: a table [1, 3] would put the "
        "tokens of block 3 where those of block 2 belong"
    )
    shelf.compute(A + B, hits=[1])  # block 2's tokens, now in block 4
    got = shelf.hits([*A, *B, *C, 0])
    assert got == [1, 4, 3], f"block 4 has taken the place of block 2; the hit is {got}, expected [1, 4, 3]"


@check("unit", spec="R6.22", hint=3)
def nothing_is_remembered_from_an_earlier_lookup(mine: Mine) -> None:
    """A request that waits is looked up in every step. Between two lookups its blocks may be evicted."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B)
    request = shelf.request([*A, *B, 0])
    before = [block.block_id for block in shelf.index.match(request)]
    shelf.evict(2)
    after = [block.block_id for block in shelf.index.match(request)]
    assert (before, after) == ([1, 2], [1]), (
        f"a waiting request hits {before}; then block 2 is evicted, and it hits {after}, expected [1]: block 2 holds "
        "tokens of another request by now"
    )


@check("unit", spec="R6.4", hint=3)
def a_collision_is_no_hit(mine: Mine) -> None:
    """If two prefixes have the same name, the tokens decide. A weak hash costs hits, and never gives a wrong one."""
    shelf = Shelf(mine.cls, weak_hash=True)
    one, two = [3, 0, 0, 0], [0, 3, 0, 0]
    shelf.compute(one)
    assert shelf.request(one).block_hashes == shelf.request(two).block_hashes, "the two blocks collide in this check"
    got = shelf.hits([*two, 0])
    assert got == [], f"{two} has the name of {one}, which is in block 1; the hit is {got}, expected none: wrong tokens"
    shelf.compute(two)  # in block 2, whose name is taken
    got = shelf.hits([*two, 0])
    assert got == [], f"{two} has a name that {one} has taken before, and hits {got}: it must not be published"
    got = shelf.hits([*one, 0])
    assert got == [1], f"{one} in block 1 lost its name to {two}, which came later: it hits {got}, expected [1]"


@check("unit", spec="R6.4", hint=3)
def the_parent_decides_too(mine: Mine) -> None:
    """Two prefixes may have the same name and the same last block. The parent in the meaning tells them apart."""
    shelf = Shelf(mine.cls)
    shelf.index.hasher.hash_function = lambda data: bytes([sum(data[-16:]) % 251])  # of the block's own tokens alone
    shelf.compute(A + B)  # 1, 2
    shelf.compute(C)  # 3
    got = shelf.hits([*C, *B, 0])
    assert got == [3], (
        f"{A + B} is in 1, 2 and {C} in 3; under a hash that forgets the parent, {[*C, *B, 0]} hits {got}, expected "
        "[3]: block 2 has the right name and the right tokens, behind another prefix"
    )


@check("unit", spec="R6.4", hint=3)
def a_collision_ends_publishing(mine: Mine) -> None:
    """A block whose name is taken is not published, and neither is any block behind it."""
    shelf = Shelf(mine.cls, weak_hash=True)
    shelf.compute([3, 0, 0, 0])
    table = shelf.compute([0, 3, 0, 0, 1, 0, 0, 0])  # block 0 has the name of the other prompt, block 1 a free one
    names = [shelf.blocks[block_id].block_hash for block_id in table]
    assert names == [None, None], (
        f"the name of the first of two blocks is taken; their block_hash is {names}, expected [None, None]: a block "
        "that is published behind one that is not can never be hit, and its parent has no name"
    )


@check("unit", spec="R6.5", hint=2)
def equal_blocks_are_all_kept(mine: Mine) -> None:
    """Two requests may compute the same prefix. The first block is hit, and when it goes, the other takes over."""
    shelf = Shelf(mine.cls)
    shelf.compute(A + B)  # 1, 2
    shelf.compute(A + B)  # 3, 4, by a request that did not look
    got = shelf.hits([*A, *B, 0])
    assert got == [1, 2], f"{A + B} is in 1, 2 and again in 3, 4; the hit is {got}, expected [1, 2]"
    shelf.evict(1)
    got = shelf.hits([*A, *B, 0])
    assert got == [3, 2], f"block 1 was evicted, block 3 holds the same; the hit is {got}, expected [3, 2]"
    shelf.index.insert(shelf.request(C), [shelf.blocks[9]], 1)
    shelf.index.insert(shelf.request(C), [shelf.blocks[8]], 1)
    got = shelf.hits([*C, 0])
    assert got == [9], f"{C} was published in block 9 and then in block 8; the hit is {got}, expected [9], the first"


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
    shelf.index.insert(shelf.request(A + B), shelf.blocks[4:6], 1)
    assert shelf.blocks[5].block_hash is None, "insert(..., 1) published the second block: its tokens are not computed"


@check("property", spec="R6.5", hint=1)
def hits_are_the_longest_known_prefix(mine: Mine) -> None:
    """Random requests and evictions: hits are compared with a list of all token prefixes that blocks hold."""
    for seed in range(60):
        run_random_life(mine, random.Random(seed), 3 + seed // 3)


def run_random_life(mine: Mine, rng: random.Random, num_steps: int) -> None:
    shelf, story = Shelf(mine.cls), []
    holds: dict[int, tuple[Any, ...]] = {}  # block id -> salt and all tokens up to its end
    for _ in range(num_steps):
        if holds and rng.random() < 0.3:
            block_id = rng.choice(sorted(holds))
            story.append(f"evict {block_id}")
            shelf.evict(block_id)
            del holds[block_id]
        else:
            tokens = [token for _ in range(rng.randint(1, 3)) for token in rng.choice((A, B))] + [0] * rng.randint(0, 1)
            salt = rng.choice((None, None, "s"))
            story.append(f"compute {tokens}" + (f" with salt {salt}" if salt else ""))
            prefixes = [(salt, *tokens[: 4 * (i + 1)]) for i in range(len(tokens) // 4)]
            got = shelf.hits(tokens, salt)
            n = next((i for i, prefix in enumerate(prefixes) if prefix not in holds.values()), len(prefixes))
            n = min(n, (len(tokens) - 1) // 4)
            assert len(got) == n, f"{'; '.join(story)}: {len(got)} blocks hit, {n} are known"
            wrong = [block_id for block_id, prefix in zip(got, prefixes, strict=False) if holds.get(block_id) != prefix]
            assert not wrong, f"{'; '.join(story)}: the hit {got} has blocks of other tokens: {wrong}"
            table = shelf.compute(tokens, salt, hits=got)
            holds |= dict(zip(table, prefixes, strict=True))
        shelf.check_integrity("; ".join(story))


@check("counters", spec="R6.5", hint=2)
def a_decode_step_publishes_one_block(mine: Mine) -> None:
    """A request of 100 blocks that fills one more enters one block, and does not go through the 100 again."""
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
