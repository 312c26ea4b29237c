# killed-by: a_block_that_is_not_full_has_no_name | 3 tokens in blocks of 4 have 1
"""Names the last block although it is not full. More tokens join it later, under the name of the first ones.

vLLM issue 5188: a partial block was hashed, and a request with other tokens in its rest was given it.
"""

from folovllm.core.block_hash import extra_keys, pack_tokens
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.request import Request


class HashPrefixIndex(Reference):
    def hash_new_blocks(self, request: Request) -> None:
        for i in range(len(request.block_hashes), -(-request.num_tokens // self.block_size)):
            tokens = pack_tokens(request.all_token_ids[i * self.block_size : (i + 1) * self.block_size])
            parent, extra = (request.block_hashes[-1], b"") if i else (self.hasher.root, extra_keys(request))
            request.block_tokens.append(tokens)
            request.block_hashes.append(self.hasher.hash_function(parent + tokens + extra))
