"""The two indexes alone: what they find, what they forget, and that they find the same."""

import sys
from collections.abc import Callable, Sequence
from itertools import count
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folovllm.config import CacheConfig
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex, NullPrefixIndex, make_prefix_index
from folovllm.core.prefix_trie import TriePrefixIndex
from tests.m6.cache_helpers import INDEXES, Index, known_blocks, make_index, named_request, weaken

pytestmark = pytest.mark.m6


class Shelf:
    """An index and the blocks that go into it, numbered 1, 2, 3, ..."""

    def __init__(self, index: Index, num_blocks: int = 64) -> None:
        self.index = index
        self.blocks = [KVCacheBlock(i) for i in range(num_blocks)]
        self.unused = self.blocks[1:]

    def put(self, tokens: Sequence[int], salt: str | None = None) -> list[KVCacheBlock]:
        """A request computes all its tokens: hit blocks first, new ones behind."""
        request = named_request(self.index, tokens, salt)
        full = len(tokens) // self.index.block_size
        table = self.index.match(request)
        table += [self.unused.pop(0) for _ in range(full - len(table))]
        self.index.insert(request, table, full)
        self.index.check_integrity(self.blocks)
        return table

    def put_own(self, tokens: Sequence[int]) -> list[KVCacheBlock]:
        """The same by a request that does not read the cache."""
        request = named_request(self.index, tokens)
        table = [self.unused.pop(0) for _ in range(len(tokens) // self.index.block_size)]
        self.index.insert(request, table, len(table))
        self.index.check_integrity(self.blocks)
        return table

    def lose_unchecked(self, block: KVCacheBlock) -> None:
        self.index.remove(block)
        block.block_hash = None

    def lose(self, block: KVCacheBlock) -> None:
        self.lose_unchecked(block)
        self.index.check_integrity(self.blocks)

    def hits(self, tokens: Sequence[int], salt: str | None = None) -> list[int]:
        return [block.block_id for block in self.index.match(named_request(self.index, tokens, salt))]

    def partial(self, tokens: Sequence[int], salt: str | None = None, without: Sequence[int] = ()) -> tuple[int, int]:
        request = named_request(self.index, tokens, salt)
        block, length = self.index.match_partial(request, self.index.match(request), without)
        return (block.block_id if block else 0), length


@pytest.fixture(params=INDEXES)
def shelf(request: pytest.FixtureRequest) -> Shelf:
    return Shelf(make_index(request.param))


def is_empty(index: Index) -> bool:
    """Not even an entry that leads nowhere is left."""
    if isinstance(index, HashPrefixIndex):
        return not (index.blocks or index.meaning or index.children)
    return not (index.roots or index.node_of)


A = [1, 2, 3, 4]
B = [5, 6, 7, 8]
C = [9, 9, 9, 9]


def test_the_config_chooses() -> None:
    def kind(**args: object) -> type:
        return type(make_prefix_index(CacheConfig(block_size=4, **args)))  # type: ignore[arg-type]

    assert kind() is NullPrefixIndex
    assert kind(prefix_index="trie") is NullPrefixIndex, "which index is one thing, whether there is one another"
    assert kind(enable_prefix_caching=True) is HashPrefixIndex
    assert kind(enable_prefix_caching=True, prefix_index="trie") is TriePrefixIndex


def test_the_null_index_knows_nothing() -> None:
    index, block = NullPrefixIndex(), KVCacheBlock(1)
    request = named_request(index, A + B)
    index.insert(request, [block], 1)
    assert index.match(request) == [] and index.match_partial(request, []) == (None, 0)
    assert block.block_hash is None and request.block_hashes == request.block_tokens == []


def test_the_longest_prefix(shelf: Shelf) -> None:
    shelf.put(A + B + C)
    assert shelf.hits([*A, *B, *C, 0]) == [1, 2, 3]
    assert shelf.hits([*A, *B, 0, 0, 0, 0]) == [1, 2]
    assert shelf.hits([*A, *C, 0]) == [1]
    assert shelf.hits([*B, *C, 0]) == [], "known blocks, but behind another prefix"
    assert shelf.hits([0, *A, *B]) == []


def test_one_token_is_always_left_to_compute(shelf: Shelf) -> None:
    """nano-vllm issues 144 and 199: all of a prompt cached, and a query of no token at all."""
    shelf.put(A + B)
    assert shelf.hits(A + B) == [1] and shelf.hits([*A, *B, 0]) == [1, 2] and shelf.hits(A) == []


def test_a_partial_block_is_never_published(shelf: Shelf) -> None:
    """vLLM issue 5188."""
    shelf.put([*A, 5, 6, 7])
    assert shelf.hits([*A, 5, 6, 7, 8, 9]) == [1]
    assert list(known_blocks(shelf.index)) == [1]


def test_salts_do_not_meet(shelf: Shelf) -> None:
    shelf.put(A + B, salt="mine")
    assert shelf.hits([*A, *B, 0]) == shelf.hits([*A, *B, 0], "yours") == []
    assert shelf.hits([*A, *B, 0], "mine") == [1, 2]
    assert shelf.partial([1, 2, 9, 9], "yours") == (0, 0) and shelf.partial([1, 2, 9, 9], "mine") == (1, 2)


def test_the_first_of_several_equal_blocks_is_hit_and_the_next_after_it(shelf: Shelf) -> None:
    shelf.put_own(A + B)
    shelf.put_own(A + B)
    assert shelf.hits([*A, *B, 0]) == [1, 2]
    shelf.lose(shelf.blocks[1])
    assert shelf.hits([*A, *B, 0]) == [3, 2], "blocks of two requests, one prefix"


def test_what_lies_behind_a_lost_block_comes_back_with_it(shelf: Shelf) -> None:
    """A node without a block stays while one below it has one. Both indexes: it is what makes their hits equal."""
    shelf.put(A + B + C)
    shelf.lose(shelf.blocks[1])
    assert shelf.hits([*A, *B, *C, 0]) == []
    shelf.put_own(A)
    assert shelf.hits([*A, *B, *C, 0]) == [4, 2, 3]


def test_nothing_is_left_when_all_blocks_are_gone(shelf: Shelf) -> None:
    tables = [shelf.put(A + B + C), shelf.put(A + C, salt="s"), shelf.put_own(A + B)]
    for block in {block for table in tables for block in table}:
        shelf.lose(block)
    assert is_empty(shelf.index)


def test_publishing_goes_on_where_it_stopped(shelf: Shelf) -> None:
    """A request that grows publishes its table again and again; what is published already stays as it is."""
    request = named_request(shelf.index, A)
    table = shelf.blocks[1:5]
    shelf.index.insert(request, table, 1)
    for token_id in [*B, *C]:
        request.append_output_token_id(token_id)
        shelf.index.insert(request, table, request.num_tokens // 4)
        shelf.index.check_integrity(shelf.blocks)
    assert [block.block_hash is not None for block in table] == [True, True, True, False]
    assert shelf.hits([*A, *B, *C, 0]) == [1, 2, 3]


@pytest.mark.parametrize("kind", INDEXES)
@pytest.mark.parametrize("method", ["insert", "remove"])
def test_an_interrupted_change_can_be_cleaned_up(kind: str, method: str) -> None:
    """vLLM issue 17738: Ctrl-C can strike at any line. Removing the blocks that have a hash leaves no trace."""
    for line in count():
        shelf = Shelf(make_index(kind))
        table = shelf.put(A + B + C)
        if method == "insert":
            request, blocks = named_request(shelf.index, A + C), [table[0], *shelf.unused[:1]]
            raised = raises_at_line(line, shelf.index.insert, request, blocks, 2)
        else:
            for block in table[:2]:
                shelf.lose(block)
            raised = raises_at_line(line, shelf.index.remove, table[2])
        for block in shelf.blocks:
            if block.block_hash is not None:
                shelf.lose_unchecked(block)
        shelf.index.check_integrity(shelf.blocks)
        assert is_empty(shelf.index), f"line {line} of {method}"
        if not raised:
            assert line > 5
            return


def raises_at_line(n: int, function: Callable[..., None], *args: Any) -> bool:
    """Calls `function`, with a KeyboardInterrupt at the n-th line that runs in the files of the indexes."""
    lines = count()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if event == "line" and "core/prefix_" in frame.f_code.co_filename and next(lines) == n:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        function(*args)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


# ---- hits that end inside a block


def test_a_partial_hit_is_the_longest_among_the_children(shelf: Shelf) -> None:
    shelf.put([*A, 5, 6, 7, 8])
    shelf.put([*A, 5, 6, 9, 9])
    shelf.put([5, 6, 7, 8])
    assert shelf.partial([*A, 5, 6, 7, 0]) == (2, 3)
    assert shelf.partial([*A, 5, 6, 9, 0]) == (3, 3)
    assert shelf.partial([*A, 5, 0]) == (2, 1), "equally long: the one that was there first"
    assert shelf.partial([*A, 0, 0]) == (0, 0)
    assert shelf.partial([1, 2, 0, 0]) == (1, 2), "below the root too"


def test_a_partial_hit_leaves_the_last_token(shelf: Shelf) -> None:
    shelf.put(A + B)
    assert shelf.partial(A + B) == (2, 3) and shelf.partial([*A, 5]) == (0, 0)


def test_a_source_must_be_computed_and_have_a_block(shelf: Shelf) -> None:
    shelf.put_own(A + B)
    shelf.put_own(A + B)
    shelf.put([*A, 5, 0, 0, 0])
    wanted = [*A, 5, 6, 7, 0]
    assert shelf.partial(wanted) == (2, 3)
    assert shelf.partial(wanted, without=[2]) == (4, 3)
    assert shelf.partial(wanted, without=[2, 4]) == (5, 1), "a shorter one is better than none"
    shelf.put([*A, *B, *C])
    shelf.lose(shelf.blocks[2])
    shelf.lose(shelf.blocks[4])
    assert shelf.partial(wanted) == (5, 1), "the node is there, its blocks are not"


# ---- collisions


@pytest.mark.parametrize("values", [1, 2, 3])
def test_a_collision_costs_a_hit_and_never_gives_a_wrong_one(values: int) -> None:
    """openvino.genai issue 3722: another prompt's cache was served, because its hash was the same."""
    shelf = Shelf(make_index("hash"))
    weaken(shelf.index, lambda data: bytes([sum(data) % values]))
    first = [[a, b, c, 0] for a in range(3) for b in range(3) for c in range(3)]
    for tokens in first:
        shelf.put(tokens)
        for other in first:
            hits = shelf.hits([*other, 0])
            assert [known_blocks(shelf.index)[i] for i in hits] in ([], [tuple(other)])
    assert len(known_blocks(shelf.index)) == values


def test_blocks_behind_a_collision_are_not_published() -> None:
    """Their names are made of a name that is somebody else's: the same tokens behind it would be taken for ours."""
    shelf = Shelf(make_index("hash"))
    weaken(shelf.index, lambda data: data[-1:])  # the last byte of a block decides
    shelf.put([1, 0, 0, 7 << 24, 2, 0, 0, 8 << 24])
    shelf.put([9, 0, 0, 7 << 24, 2, 0, 0, 8 << 24])
    assert sorted(known_blocks(shelf.index)) == [1, 2]
    assert shelf.hits([9, 0, 0, 7 << 24, 2, 0, 0, 8 << 24, 5]) == []


def test_a_collision_with_a_lost_parent_is_still_a_collision() -> None:
    """The first prefix's block is evicted, its child is not. A colliding prefix must not inherit that child."""
    shelf = Shelf(make_index("hash"))
    weaken(shelf.index, lambda data: data[-1:])
    shelf.put([1, 0, 0, 7 << 24, 2, 0, 0, 8 << 24])
    shelf.lose(shelf.blocks[1])
    shelf.put([9, 0, 0, 7 << 24])
    assert shelf.hits([9, 0, 0, 7 << 24, 2, 0, 0, 8 << 24, 5]) == []


def test_a_hash_keeps_its_meaning_while_any_child_is_left() -> None:
    """The same, when of two children one is evicted as well."""
    shelf = Shelf(make_index("hash"))
    weaken(shelf.index, lambda data: data[-1:])
    shelf.put([1, 0, 0, 7 << 24, 2, 0, 0, 8 << 24])
    shelf.put([1, 0, 0, 7 << 24, 2, 0, 0, 9 << 24])
    shelf.lose(shelf.blocks[1])
    shelf.lose(shelf.blocks[2])
    shelf.put([9, 0, 0, 7 << 24])
    assert shelf.hits([9, 0, 0, 7 << 24, 2, 0, 0, 9 << 24, 5]) == []


# ---- hash and trie side by side

SEQUENCES = st.lists(st.integers(0, 1), min_size=1, max_size=9)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["put", "put", "own", "lose", "look"]), SEQUENCES, st.sampled_from([None, "s"])),
    max_size=40,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(operations=OPERATIONS, block_size=st.integers(1, 3))
def test_both_indexes_have_the_same_hits(operations: list, block_size: int) -> None:
    """The same life, step by step; with a hash of three values hits may be missing, but are never others."""
    shelves = {kind: Shelf(make_index(kind, block_size), 400) for kind in ("trie", "hash", "weak")}
    trie, weak = shelves["trie"], shelves["weak"]
    for operation, tokens, salt in operations:
        for shelf in shelves.values():
            if operation == "put":
                shelf.put(tokens, salt)
            elif operation == "own":
                shelf.put_own(tokens)
            elif operation == "lose" and known_blocks(shelf.index):
                known = sorted(known_blocks(shelf.index))
                shelf.lose(shelf.blocks[known[len(tokens) % len(known)]])
        expected = trie.hits([*tokens, 0], salt)
        assert shelves["hash"].hits([*tokens, 0], salt) == expected
        assert shelves["hash"].partial([*tokens, 0], salt) == trie.partial([*tokens, 0], salt)
        for n, block_id in enumerate(weak.hits([*tokens, 0], salt), start=1):
            assert known_blocks(weak.index)[block_id] == tuple(tokens[: n * block_size])
