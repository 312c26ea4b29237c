"""m6/trie: the prefix index as a tree, walked by comparing tokens. The reference supplies the rest."""

from folovllm.core.block_hash import extra_keys  # noqa: F401 - you will need them
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import num_published  # noqa: F401
from folovllm.core.prefix_trie import Node  # noqa: F401
from folovllm.core.prefix_trie import TriePrefixIndex as Reference
from folovllm.request import Request


class TriePrefixIndex(Reference):
    """Your index. `self.roots`: extra keys -> root node. `self.node_of`: block id -> the node that has the block."""

    def match(self, request: Request) -> list[KVCacheBlock]:
        """Returns the blocks of the longest known prefix of `request`, in order. Changes nothing.

        They cover at most num_tokens - 1 tokens. Of a node with several blocks the first one is hit.
        """
        raise NotImplementedError("m6/trie: match")

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        """Publishes the first `num_full_blocks` of `blocks`, the table of `request`. The leading ones may be already.

        A published block has its packed tokens as block_hash.
        """
        raise NotImplementedError("m6/trie: insert")

    def remove(self, block: KVCacheBlock) -> None:
        """Forgets `block`, and every node that leads to no block any more. Leaves block.block_hash to the caller."""
        raise NotImplementedError("m6/trie: remove")
