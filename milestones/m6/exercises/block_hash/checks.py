"""The checks of m6/block_hash: what your index names, on requests that are nothing but tokens and a salt."""

import random
from collections.abc import Sequence
from typing import Any

from folovllm.config import CacheConfig
from folovllm.core.block_hash import extra_keys, pack_tokens
from folovllm.core.prefix_index import HashPrefixIndex
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import make_request
from folovllm.request import Request

PROMPTS = ([1, 2, 3, 4, 9, 9, 9, 9, 5], [4, 3, 2, 1, 9, 9, 9, 9], [1, 2, 3, 4, 7, 7, 7, 7])


def prediction() -> str:
    one, two, three = (named(make_index(HashPrefixIndex), prompt).block_hashes for prompt in PROMPTS)
    equal = [name for name in one + two + three if (one + two + three).count(name) > 1]
    assert equal == [one[0], three[0]], "the page of this exercise says so"
    different = len({*one, *two, *three})
    return f"{len(one)}, {len(two)}, {len(three)} and {different}: prompts one and three begin alike, and share a name"


def make_index(cls: Any, block_size: int = 4) -> Any:
    return cls(CacheConfig(block_size=block_size, enable_prefix_caching=True))


def named(index: Any, tokens: Sequence[int], salt: str | None = None) -> Request:
    """A request as the engine makes it: it calls hash_new_blocks for its prompt, and after each token."""
    request = make_request("r", tokens, cache_salt=salt)
    request.attach_block_hasher(index.hash_new_blocks)
    return request


def names(mine: Mine, tokens: Sequence[int], salt: str | None = None) -> list[bytes]:
    return named(make_index(mine.cls), tokens, salt).block_hashes


@check("unit", spec="R6.1", hint=1)
def the_parent_matters(mine: Mine) -> None:
    """The same tokens behind another prefix have other keys and values, so they have another name."""
    one, two = names(mine, PROMPTS[0]), names(mine, PROMPTS[1])
    assert one[1] != two[1], (
        "9 9 9 9 has the same name behind 1 2 3 4 and behind 4 3 2 1: the second request would be given keys and "
        "values that belong to another text"
    )


@check("unit", spec="R6.1", hint=3)
def a_block_that_is_not_full_has_no_name(mine: Mine) -> None:
    """Only full blocks are named: a partial one will hold other tokens soon, under the same name."""
    for num_tokens, expected in ((3, 0), (4, 1), (7, 1), (8, 2), (9, 2)):
        n = len(names(mine, range(num_tokens)))
        assert n == expected, f"{num_tokens} tokens in blocks of 4 have {n} names, expected {expected}"


@check("unit", spec="R6.1", hint=2)
def the_chain_by_hand(mine: Mine) -> None:
    """Two full blocks get two names: each is the hash of the name before, the packed tokens and the extra keys."""
    for salt in (None, "mine"):
        index = make_index(mine.cls)
        request = named(index, range(100, 108), salt)
        blocks = [pack_tokens(range(100, 104)), pack_tokens(range(104, 108))]
        assert request.block_tokens == blocks, (
            f"8 tokens in blocks of 4: block_tokens has {len(request.block_tokens)} entries, expected 2 packed blocks"
        )
        first = index.hasher.hash_function(index.hasher.root + blocks[0] + extra_keys(request))
        second = index.hasher.hash_function(first + blocks[1])
        assert request.block_hashes[:1] == [first], (
            f"salt {salt!r}: the name of block 0 is not hash_function(root + its tokens + extra keys)"
        )
        assert request.block_hashes == [first, second], (
            f"salt {salt!r}, 2 full blocks: {len(request.block_hashes)} names, and the second is not "
            "hash_function(name of block 0 + tokens of block 1)"
        )


@check("unit", spec="R6.1", hint=1)
def equal_prefixes_have_equal_names(mine: Mine) -> None:
    """Two requests that begin alike share the names of the blocks that are alike, whichever process computes them."""
    one, three = names(mine, PROMPTS[0]), names(mine, PROMPTS[2])
    assert one[0] == three[0], "two prompts begin with 1 2 3 4, and block 0 has two names: nothing would ever be hit"
    assert one[1] != three[1], "9 9 9 9 and 7 7 7 7 behind 1 2 3 4 have the same name"


@check("unit", spec="R6.2", hint=3)
def a_salt_separates(mine: Mine) -> None:
    """Requests with different salts share no name in any block: a hit can be timed, and tells what others asked."""
    salts = (None, "mine", "yours")
    all_names = [name for salt in salts for name in names(mine, range(12), salt)]
    assert len(set(all_names)) == 9, (
        f"3 blocks with the salts {salts} have {len(set(all_names))} different names, expected 9"
    )


@check("unit", spec="R6.3", hint=3)
def token_by_token_is_all_at_once(mine: Mine) -> None:
    """A text that is generated has the names that it would have as a prompt. A chat lives on that."""
    index = make_index(mine.cls)
    request = named(index, range(3), "mine")
    for token_id in range(3, 13):
        request.append_output_token_id(token_id)
        expected = (token_id + 1) // 4
        n = len(request.block_hashes)
        assert n == expected, f"after {token_id + 1} tokens in blocks of 4 there are {n} names, expected {expected}"
    assert len(request.block_tokens) == 3, f"13 tokens in blocks of 4: block_tokens has {len(request.block_tokens)}"
    same = request.block_hashes == names(mine, range(13), "mine")
    assert same, "3 tokens and then 10 more, one by one, have other names than 13 at once: answers would not be hit"


@check("property", spec="R6.1", hint=1)
def equal_names_mean_equal_prefixes(mine: Mine) -> None:
    """For random prompts over few tokens, two blocks have the same name exactly if salt and whole prefix are equal."""
    for block_size in (1, 2, 3):
        index, rng, prefix_of = make_index(mine.cls, block_size), random.Random(block_size), {}
        for i in range(120):
            tokens = [rng.randrange(2) for _ in range(1 + i // 12)]
            salt = rng.choice((None, "a"))
            for block, name in enumerate(named(index, tokens, salt).block_hashes):
                prefix = (salt, *tokens[: (block + 1) * block_size])
                other = prefix_of.setdefault(name, prefix)
                assert other == prefix, (
                    f"blocks of {block_size}: block {block} of {tokens} (salt {salt!r}) has the name of the prefix "
                    f"{list(other[1:])} (salt {other[0]!r})"
                )
        expected = len(set(prefix_of.values()))
        assert len(prefix_of) == expected, (
            f"blocks of {block_size}: {len(prefix_of)} names for {expected} prefixes: equal prefixes are not found"
        )


@check("counters", spec="R6.3", hint=2)
def no_block_is_hashed_twice(mine: Mine) -> None:
    """40 tokens in blocks of 4 are hashed 10 times in all, however often hash_new_blocks is called."""
    index, calls = make_index(mine.cls), []
    hash_function = index.hasher.hash_function
    index.hasher.hash_function = lambda data: calls.append(data) or hash_function(data)
    request = named(index, range(20))
    for token_id in range(20, 40):
        request.append_output_token_id(token_id)
    assert len(calls) == 10, (
        f"a prompt of 20 tokens and 20 more, blocks of 4: {len(calls)} hashes were computed, expected 10: a block "
        "that has a name keeps it, so begin at len(request.block_hashes)"
    )
