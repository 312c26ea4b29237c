"""Blocks of the KV cache, the queue of free blocks, and the arithmetic of how many blocks there are.

Milestone: M1 (the arithmetic), M3 (many small blocks), M6 (hit statistics). vLLM counterpart:
vllm/v1/core/kv_cache_utils.py, and PrefixCachingMetrics in it. Left out: KV groups of different kinds (sliding window,
Mamba). Hashes are in block_hash.py.

Row 1: no torch.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from folovllm.config import DTYPE_BYTES, EngineConfig
from folovllm.hf_config import ModelArchitecture
from folovllm.parts import load_part
from folovllm.utils import cdiv

GIB = 1024**3
CPU_KV_CACHE_CEILING = 4 * GIB  # the same limit as in vLLM's CPU build


@dataclass(eq=False, slots=True)
class KVCacheBlock:
    """One block (page): room for the K and V of `block_size` tokens in every layer.

    The links belong to the free queue, and a block outside the queue has none. A block with `ref_cnt` 0 is in the
    queue. A block with a `block_hash` is published: the prefix index knows it by that name, and a request with the same
    prefix may hit it.
    """

    block_id: int
    ref_cnt: int = 0
    block_hash: bytes | None = None
    prev_free_block: "KVCacheBlock | None" = None
    next_free_block: "KVCacheBlock | None" = None
    is_null: bool = False

    def __repr__(self) -> str:
        return f"KVCacheBlock({self.block_id}, ref_cnt={self.ref_cnt}{', null' if self.is_null else ''})"


class FreeKVCacheBlockQueue:
    """Free blocks as a doubly linked list through the blocks themselves. The head is used next.

    A deque would not do: with prefix caching, a free block can be hit and must leave the *middle* of the queue in O(1).

        head sentinel <-> block 4 <-> block 1 <-> block 3 <-> tail sentinel
           popleft() takes 4                append() puts here ^
    """

    def __init__(self, blocks: list[KVCacheBlock]) -> None:
        self.num_free_blocks = 0
        self._head = KVCacheBlock(block_id=-1)
        self._tail = KVCacheBlock(block_id=-1)
        self._head.next_free_block = self._tail
        self._tail.prev_free_block = self._head
        self.append_n(blocks)

    def popleft(self) -> KVCacheBlock:
        """Takes the block at the head. Raises ValueError if the queue is empty."""
        block = self._head.next_free_block
        assert block is not None
        if block is self._tail:
            raise ValueError("No free blocks available")
        self.remove(block)
        return block

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        """Takes n blocks from the head, in order. Raises ValueError, with nothing taken, if there are fewer."""
        if n > self.num_free_blocks:
            raise ValueError(f"No {n} free blocks available, only {self.num_free_blocks}")
        return [self.popleft() for _ in range(n)]

    def remove(self, block: KVCacheBlock) -> None:
        """Takes `block` out, wherever it is in the queue. Raises RuntimeError if it is not in the queue."""
        before, after = block.prev_free_block, block.next_free_block
        if before is None or after is None:
            raise RuntimeError(f"{block} is not in the free queue")
        before.next_free_block, after.prev_free_block = after, before
        block.prev_free_block = block.next_free_block = None
        self.num_free_blocks -= 1

    def append(self, block: KVCacheBlock) -> None:
        """Puts `block` at the tail, where it is the last to be used again."""
        assert self._tail.prev_free_block is not None
        self._insert(self._tail.prev_free_block, block, self._tail)

    def append_n(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            self.append(block)

    def prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        """Puts `blocks` at the head in the given order, so that blocks[0] is used next."""
        for block in reversed(blocks):
            assert self._head.next_free_block is not None
            self._insert(self._head, block, self._head.next_free_block)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        """Returns all free blocks from head to tail. It takes linear time: for tests and integrity checks."""
        blocks = []
        block = self._head.next_free_block
        while block is not None and block is not self._tail:
            blocks.append(block)
            block = block.next_free_block
        return blocks

    def _insert(self, before: KVCacheBlock, block: KVCacheBlock, after: KVCacheBlock) -> None:
        assert block.prev_free_block is None and block.next_free_block is None, f"{block} is already in the free queue"
        block.prev_free_block, block.next_free_block = before, after
        before.next_free_block = after.prev_free_block = block
        self.num_free_blocks += 1


HIT_RATE_WINDOW = 1000  # requests


class PrefixCacheStats:
    """Counts tokens looked up and tokens hit, when a request is admitted; resumed requests apart (R6.13, R6.15).

    A request that comes back after a preemption hits blocks that it has computed itself. This says nothing about how
    much the requests share, so it does not count towards the hit rate.
    """

    def __init__(self, window: int = HIT_RATE_WINDOW) -> None:
        self.queries = self.hits = self.preempted_queries = self.preempted_hits = 0  # tokens, since the start
        self._recent: deque[tuple[int, int]] = deque()  # (queries, hits) of the last `window` requests
        self._window = window
        self._recent_queries = self._recent_hits = 0

    def record(self, num_tokens: int, num_hit_tokens: int, is_resumed: bool) -> None:
        if is_resumed:
            self.preempted_queries += num_tokens
            self.preempted_hits += num_hit_tokens
            return
        self.queries += num_tokens
        self.hits += num_hit_tokens
        self._recent.append((num_tokens, num_hit_tokens))
        self._recent_queries += num_tokens
        self._recent_hits += num_hit_tokens
        if len(self._recent) > self._window:
            queries, hits = self._recent.popleft()
            self._recent_queries -= queries
            self._recent_hits -= hits

    @property
    def hit_rate(self) -> float:
        """The share of the looked-up tokens that were hit, 0..1, over the last requests. 0.0 if there were none."""
        return self._recent_hits / self._recent_queries if self._recent_queries else 0.0


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
    """Returns how many bytes of K and V one token adds to the cache.

    The factor is kv_heads * head_dim, not hidden_size. E.g. SmolLM2-135M in bf16: 2 * 30 * 3 * 64 * 2 = 23,040.
    """
    return 2 * layers * kv_heads * head_dim * dtype_bytes


@dataclass(frozen=True)
class KVCacheConfig:
    """How the KV cache was divided into blocks, found out at start-up. `num_blocks` includes the null block."""

    num_blocks: int
    block_size: int  # tokens
    bytes_per_block: int  # over all layers

    @property
    def num_usable_blocks(self) -> int:
        return self.num_blocks - 1

    @property
    def usable_bytes(self) -> int:
        return self.num_usable_blocks * self.bytes_per_block

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def null_block_bytes(self) -> int:
        return self.bytes_per_block

    def __str__(self) -> str:
        return (
            f"{self.num_usable_blocks} blocks of {self.block_size} tokens, {self.usable_bytes / 2**20:.1f} MiB "
            f"(+ the null block, {self.null_block_bytes / 2**20:.1f} MiB)"
        )


class KVCacheBudget:
    """The arithmetic of the cache's size: what one token takes, and how many blocks the memory holds."""

    def bytes_per_token(self, arch: ModelArchitecture, dtype_bytes: int) -> int:
        """Returns how many bytes of K and V one token adds to the cache, over all layers."""
        return kv_bytes_per_token(arch.num_hidden_layers, arch.num_key_value_heads, arch.head_dim, dtype_bytes)

    def num_blocks(self, config: EngineConfig, available_bytes: int, bytes_per_block: int) -> int:
        """Decides the number of blocks, the null block included, of a resolved `config`.

        `num_kv_blocks` decides if it is given, or else `kv_cache_memory` (bytes), or else `available_bytes`. In the
        last case the cache never takes more than max_num_seqs requests of max_model_len could use.
        """
        cache = config.cache_config
        if cache.num_kv_blocks is not None:
            return cache.num_kv_blocks
        if cache.kv_cache_memory is not None:
            return cache.kv_cache_memory // bytes_per_block
        most_useful = config.max_num_seqs * cdiv(config.max_model_len, config.block_size) + 1
        return min(available_bytes // bytes_per_block, most_useful)


def make_kv_cache_config(config: EngineConfig, available_bytes: int) -> KVCacheConfig:
    """Divides the memory of a rank into blocks, as the part core.kv_cache_budget computes.

    With several ranks, it is the rank whose layers take the most: all ranks have equally many blocks. Raises ValueError
    with the numbers if one request of max_model_len does not fit.
    """
    budget: KVCacheBudget = load_part("core.kv_cache_budget", config.parts)()
    dtype_bytes = DTYPE_BYTES[config.model_config.dtype]
    arch = config.parallel_config.largest_attention_arch(config.model_config.arch)
    bytes_per_block = budget.bytes_per_token(arch, dtype_bytes) * config.block_size
    num_blocks = budget.num_blocks(config, available_bytes, bytes_per_block)
    kv_cache_config = KVCacheConfig(num_blocks, config.block_size, bytes_per_block)
    _check_one_request_fits(kv_cache_config, config.max_model_len)
    return kv_cache_config


def _check_one_request_fits(kv: KVCacheConfig, max_model_len: int) -> None:
    needed = cdiv(max_model_len, kv.block_size)
    if kv.num_usable_blocks >= needed:
        return
    tokens = max(kv.num_usable_blocks, 0) * kv.block_size
    shorter = f", or set max_model_len to at most {tokens}" if tokens >= 2 else ""
    raise ValueError(
        f"the KV cache is too small: one request of max_model_len={max_model_len} needs {needed} blocks of "
        f"{kv.block_size} tokens plus the null block ({(needed + 1) * kv.bytes_per_block / 2**20:.1f} MiB), but there "
        f"are {max(kv.num_blocks, 0)} ({max(kv.num_blocks, 0) * kv.bytes_per_block / 2**20:.1f} MiB). Raise "
        f"kv_cache_memory, num_kv_blocks or gpu_memory_utilization{shorter}."
    )
