"""Names of blocks: the chain, what goes into it, and that naming as one goes gives what naming at once gives."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folovllm.config import CacheConfig
from folovllm.core.block_hash import BlockHasher, get_hash_function, pack_tokens, root_hash
from folovllm.request import Request
from tests.core_helpers import make_request

pytestmark = pytest.mark.m6

SHA256 = get_hash_function("sha256")
ROOT = root_hash(0, SHA256)


def hashes(tokens: list[int], salt: str | None = None, block_size: int = 4, root: bytes = ROOT) -> list[bytes]:
    request = make_request("r", tokens, cache_salt=salt)
    request.attach_block_hasher(BlockHasher(block_size, SHA256, root))
    return request.block_hashes


def test_the_chain_by_hand() -> None:
    """10 tokens in blocks of 4: two names, the second made of the first and the tokens 5 to 8."""
    first = hashlib.sha256(ROOT + bytes([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0])).digest()
    second = hashlib.sha256(first + bytes([5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0, 0, 1, 0, 0])).digest()
    assert hashes([1, 2, 3, 4, 5, 6, 7, 256, 9, 10]) == [first, second]


def test_a_block_that_is_not_full_has_no_name() -> None:
    """vLLM issue 5188: a partial block was hashed, and served to who had other tokens in its rest."""
    assert hashes([1, 2, 3]) == [] and len(hashes([1, 2, 3, 4])) == len(hashes([1, 2, 3, 4, 5])) == 1


def test_the_parent_matters() -> None:
    """The learner's classic: a block named by its own tokens alone is found behind any prefix."""
    a, b = hashes([1, 2, 3, 4, 9, 9, 9, 9]), hashes([4, 3, 2, 1, 9, 9, 9, 9])
    assert a[1] != b[1] and len({*a, *b}) == 4
    assert len(set(hashes([9] * 16))) == 4, "nor are equal blocks of one sequence the same"


def test_equal_prefixes_equal_names_and_no_others() -> None:
    a, b = hashes([1, 2, 3, 4, 5, 6, 7, 8, 1, 1, 1, 1]), hashes([1, 2, 3, 4, 5, 6, 7, 8, 2, 1, 1, 1])
    assert a[:2] == b[:2] and a[2] != b[2]


def test_order_and_size_of_tokens_matter() -> None:
    assert len({tuple(hashes(t)) for t in ([1, 2, 3, 4], [4, 3, 2, 1], [1, 2, 4, 3], [1, 2, 3, 2**31 - 1])}) == 4


def test_a_salt_is_in_the_first_block_and_so_in_all() -> None:
    plain, a, b = (hashes(list(range(12)), salt) for salt in (None, "a", "b"))
    assert len({*plain, *a, *b}) == 9
    data = hashes([0, 1, 2, 3], "a")[0]
    assert data == SHA256(ROOT + pack_tokens([0, 1, 2, 3]) + b"('cache_salt', 'a')")
    assert a[1] == SHA256(a[0] + pack_tokens([4, 5, 6, 7])), "the second block takes it from the chain"


@pytest.mark.parametrize(("a", "b"), [("x", "x'"), ("\\", "\\\\"), ("é", "e\u0301"), ("\udc00", "\ufffd"), ("1", "１")])
def test_salts_are_told_apart(a: str, b: str) -> None:
    assert hashes([1, 2, 3, 4], a) != hashes([1, 2, 3, 4], b)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 40), st.integers(1, 7))
def test_token_by_token_is_all_at_once(tokens: list[int], prompt_len: int, block_size: int) -> None:
    request = make_request("r", tokens[:prompt_len])
    request.attach_block_hasher(BlockHasher(block_size, SHA256, ROOT))
    for token_id in tokens[prompt_len:]:
        request.append_output_token_id(token_id)
    assert request.block_hashes == hashes(tokens, block_size=block_size)
    assert len(request.block_hashes) == len(request.block_tokens) == len(tokens) // block_size
    assert b"".join(request.block_tokens) == pack_tokens(tokens[: len(tokens) // block_size * block_size])


def test_no_block_is_hashed_twice() -> None:
    """Per-step cost: the hash of the whole sequence again at every token would be quadratic."""
    calls: list[bytes] = []

    def counting(data: bytes) -> bytes:
        calls.append(data)
        return SHA256(data)

    request = make_request("r", list(range(10)))
    request.attach_block_hasher(BlockHasher(4, counting, ROOT))
    for i in range(10):
        request.append_output_token_id(i)
    assert len(calls) == 20 // 4


def test_the_seed_makes_the_root() -> None:
    assert root_hash(0, SHA256) == ROOT != root_hash(1, SHA256)
    assert hashes([1, 2, 3, 4]) != hashes([1, 2, 3, 4], root=root_hash(1, SHA256))


def test_names_are_the_same_in_every_process() -> None:
    """Not Python's hash(), whose strings differ from process to process."""
    code = "from tests.m6.test_block_hash import hashes; print(hashes([1, 2, 3, 4], 'salt')[0].hex())"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == hashes([1, 2, 3, 4], "salt")[0].hex()


def test_without_a_hasher_a_request_names_nothing() -> None:
    request = Request("r", [1, 2, 3, 4], make_request("x", 1).sampling_params)
    request.append_output_token_id(5)
    assert request.block_hashes == request.block_tokens == []


# ---- the arguments


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"prefix_index": "radix"}, "prefix_index must be one of hash, trie"),
        ({"prefix_caching_hash_algo": "md5"}, "prefix_caching_hash_algo must be one of sha256, xxhash"),
        ({"prefix_caching_seed": -1}, "prefix_caching_seed"),
        ({"partial_block_hits": "yes"}, "partial_block_hits"),
        ({"enable_prefix_caching": False, "partial_block_hits": True}, "set enable_prefix_caching=True or leave it"),
    ],
)
def test_bad_arguments_name_the_fix(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheConfig(**{"enable_prefix_caching": True, **args})  # type: ignore[arg-type]


def test_xxhash_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install xxhash, or use 'sha256'"):
        CacheConfig(prefix_caching_hash_algo="xxhash")


def test_xxhash_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    xxhash = pytest.importorskip("xxhash")
    assert get_hash_function("xxhash")(b"x") == xxhash.xxh3_128_digest(b"x")
    assert CacheConfig(prefix_caching_hash_algo="xxhash").prefix_caching_hash_algo == "xxhash"
