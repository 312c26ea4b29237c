"""Builders and a driver for tests of the core. Most live in folovllm/learn/toy_engine.py, which exercises use too.

Milestone: M1. No torch, no weights.
"""

from collections.abc import Iterable
from typing import Any

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import NullPrefixIndex
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.learn.toy_engine import (  # noqa: F401 - the tests take all of them from here
    MAX_STEPS,
    AttendingExecutor,
    add_all,
    assert_nothing_leaked,
    block_ids,
    drive,
    expected_tokens,
    make_config,
    make_core,
    make_request,
    schedule_and_run,
    tiny_arch,
    tokens_of,
)
from folovllm.learn.toy_engine import check_core as check  # noqa: F401
from folovllm.request import Request


class ToyIndex(NullPrefixIndex):
    """All tokens up to the end of a full block -> that block. Slow, obvious, and free of hash collisions."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.blocks: dict[tuple[int, ...], KVCacheBlock] = {}

    def match(self, request: Request) -> list[KVCacheBlock]:
        hits: list[KVCacheBlock] = []
        while (end := (len(hits) + 1) * self.block_size) <= request.num_tokens - 1:  # one token is left to compute
            block = self.blocks.get(tuple(request.all_token_ids[:end]))
            if block is None:
                break
            hits.append(block)
        return hits

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        for i, block in enumerate(blocks[:num_full_blocks]):
            prefix = tuple(request.all_token_ids[: (i + 1) * self.block_size])
            if prefix not in self.blocks:
                self.blocks[prefix] = block
                block.block_hash = repr(prefix).encode()

    def remove(self, block: KVCacheBlock) -> None:
        self.blocks = {prefix: other for prefix, other in self.blocks.items() if other is not block}


def use_toy_index(core: EngineCore) -> ToyIndex:
    """Prefix caching before M6: put a toy index in the place of the null object."""
    index = ToyIndex(core.kv_cache_config.block_size)
    core.scheduler.kv_cache_manager.block_pool.prefix_index = index
    return index


def caching_core(**config_args: Any) -> tuple[EngineCore, ToyIndex]:
    core = make_core(**config_args)
    return core, use_toy_index(core)


def free_ids(core: EngineCore) -> list[int]:
    """Ids of the free blocks, next victim first."""
    return [b.block_id for b in core.scheduler.kv_cache_manager.block_pool.free_block_queue.get_all_free_blocks()]


def worker_requests(core: EngineCore) -> list[str]:
    """Requests whose state the worker still keeps."""
    assert isinstance(core.executor, FakeExecutor)
    return list(core.executor.requests)


def ids(requests: Iterable[Request]) -> list[str]:
    return [request.request_id for request in requests]
