"""m6/block_hash: a name for every full block, which stands for the whole prefix. The reference supplies the rest."""

from folovllm.core.block_hash import extra_keys, pack_tokens  # noqa: F401 - you will need them
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.request import Request


class HashPrefixIndex(Reference):
    """Your index. `self.block_size`, `self.hasher.hash_function` (bytes -> bytes) and `self.hasher.root` are there."""

    def hash_new_blocks(self, request: Request) -> None:
        """Appends to request.block_tokens and request.block_hashes what the new full blocks of `request` add.

        The request calls this once for its prompt, and then after each token. `block_tokens[i]` are the packed tokens
        of block i, and `block_hashes[i]` is hash_function(parent + block_tokens[i] + extra): parent is the name of
        block i - 1, for block 0 the root; extra is extra_keys(request) for block 0, and b"" for the others.
        """
        raise NotImplementedError("m6/block_hash: hash_new_blocks")
