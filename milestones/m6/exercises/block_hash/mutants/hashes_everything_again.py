# killed-by: no_block_is_hashed_twice | 150 hashes were computed, expected 10
"""Hashes all blocks anew after every token. The names are right, and a step of a long chat takes longer and longer.

vLLM pull 11187 keeps the hashes in the request, so that each block is hashed once.
"""

from folovllm.core.block_hash import extra_keys, pack_tokens
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.request import Request


class HashPrefixIndex(Reference):
    def hash_new_blocks(self, request: Request) -> None:
        request.block_tokens.clear()
        request.block_hashes.clear()
        for i in range(request.num_tokens // self.block_size):
            tokens = pack_tokens(request.all_token_ids[i * self.block_size : (i + 1) * self.block_size])
            parent, extra = (request.block_hashes[-1], b"") if i else (self.hasher.root, extra_keys(request))
            request.block_tokens.append(tokens)
            request.block_hashes.append(self.hasher.hash_function(parent + tokens + extra))
