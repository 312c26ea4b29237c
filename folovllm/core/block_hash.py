"""The hash chain: every full block of a request gets a name, such that equal names mean equal prefixes.

Milestone: M6. vLLM counterpart: hash_block_tokens and its helpers in vllm/v1/core/kv_cache_utils.py. Left out: keys of
images and of prompt embeddings, KV groups.

Row 1: no torch.

    hash of block i = H( hash of block i - 1 (or ROOT)  +  the block's tokens  +  extra keys )

    tokens  [ 5 9 2 7 | 1 1 8 4 | 6 3 ]     block size 4; the last block is not full and has no name yet
    ROOT ----> h0 -------> h1               h1 names all 8 tokens, not only 1 1 8 4

vLLM hashes the pickle of a Python tuple. Here H reads plain bytes, 4 per token, packed for all new blocks at once. This
is several times cheaper and does not depend on the Python version. It is also easy to see that no two inputs can be
confused: the parent's hash and the tokens have a fixed length, so what follows them can only be the extra keys.
"""

import hashlib
import sys
from array import array
from collections.abc import Callable, Sequence

from folovllm.request import Request

BlockHash = bytes
HashFunction = Callable[[bytes], BlockHash]
BYTES_PER_TOKEN = 4


def get_hash_function(algo: str) -> HashFunction:
    """Returns the hash function called `algo`. The config has checked that its package is installed."""
    if algo == "sha256":
        return lambda data: hashlib.sha256(data).digest()
    assert algo == "xxhash", algo
    import xxhash  # optional: 16 bytes and faster, but an attacker can construct collisions

    return lambda data: bytes(xxhash.xxh3_128_digest(data))


def root_hash(seed: int, hash_function: HashFunction) -> BlockHash:
    """Returns the parent of every first block. Equal seeds give equal names in every process; vLLM draws a seed per
    process.
    """
    return hash_function(b"folovllm prefix root %d" % seed)


def pack_tokens(token_ids: Sequence[int]) -> bytes:
    """Returns four bytes per token, the lowest byte first, on every machine."""
    packed = array("i", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def extra_keys(request: Request) -> bytes:
    """Returns what else, besides its tokens, decides a request's K/V or who may share them; b"" if there is nothing.

    The extra keys go into the hash of the first block only, and the chain carries them on to all others. (The name of a
    LoRA adapter would belong here.) `ascii` of a tuple of strings and numbers is unambiguous, whatever characters a
    salt contains.
    """
    salt = b"" if request.cache_salt is None else ascii(("cache_salt", request.cache_salt)).encode()
    offset = request.position_offset  # keys of another offset are turned by other angles
    return salt + (ascii(("position_offset", offset)).encode() if offset else b"")


class BlockPacker:
    """Keeps `request.block_tokens`, the packed tokens of every full block, up to date. Called after each new token.

    No block of a running request is packed or hashed twice. A decode step costs one comparison, and only when it fills
    a block, once in `block_size` steps, the hash of that block.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def __call__(self, request: Request) -> None:
        first, stop = len(request.block_tokens), request.num_tokens // self.block_size
        if first < stop:
            token_ids = request.all_token_ids[first * self.block_size : stop * self.block_size]
            self._add_blocks(request, pack_tokens(token_ids))

    def _add_blocks(self, request: Request, packed: bytes) -> None:
        size = self.block_size * BYTES_PER_TOKEN
        request.block_tokens += [packed[i : i + size] for i in range(0, len(packed), size)]


class BlockHasher(BlockPacker):
    """Keeps `request.block_hashes` up to date as well."""

    def __init__(self, block_size: int, hash_function: HashFunction, root: BlockHash) -> None:
        super().__init__(block_size)
        self.hash_function = hash_function
        self.root = root

    def _add_blocks(self, request: Request, packed: bytes) -> None:
        first = len(request.block_tokens)
        super()._add_blocks(request, packed)
        hash_function, hashes = self.hash_function, request.block_hashes
        parent = hashes[-1] if hashes else self.root
        extra = b"" if hashes else extra_keys(request)
        for tokens in request.block_tokens[first:]:
            parent = hash_function(parent + tokens + extra)
            hashes.append(parent)
            extra = b""
