"""m6/longest_hit: publish blocks under their names, and find the longest prefix that is known."""

from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.core.prefix_index import num_published, root_of  # noqa: F401 - you will need them
from folovllm.request import Request


class HashPrefixIndex(Reference):
    """Your index: three dictionaries, `blocks`, `meaning` and `children`. README.md says what they hold."""

    def match(self, request: Request) -> list[KVCacheBlock]:
        """Returns the blocks of the longest known prefix of `request`, in order; [] if its first block is unknown.

        They cover at most num_tokens - 1 tokens. Nothing is changed, and nothing is remembered from an earlier call.
        """
        raise NotImplementedError("m6/longest_hit: match")

    def insert(self, request: Request, blocks: list[KVCacheBlock], num_full_blocks: int) -> None:
        """Publishes the first `num_full_blocks` of `blocks`, the table of `request`, under request.block_hashes.

        The leading ones may be published already. Publishing ends at a block whose name has another meaning.
        """
        raise NotImplementedError("m6/longest_hit: insert")
