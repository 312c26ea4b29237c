# killed-by: the_chain_by_hand | root + its tokens + extra keys
"""Leaves the extra keys out, so that strangers share blocks. The time to the first token then tells what others asked.

vLLM's CVE-2025-46570 is about this side channel, and its cache_salt is the remedy.
"""

from folovllm.core.block_hash import pack_tokens
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.request import Request


class HashPrefixIndex(Reference):
    def hash_new_blocks(self, request: Request) -> None:
        for i in range(len(request.block_hashes), request.num_tokens // self.block_size):
            tokens = pack_tokens(request.all_token_ids[i * self.block_size : (i + 1) * self.block_size])
            parent = request.block_hashes[-1] if i else self.hasher.root
            request.block_tokens.append(tokens)
            request.block_hashes.append(self.hasher.hash_function(parent + tokens))
