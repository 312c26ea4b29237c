# killed-by: token_by_token_is_all_at_once | after 4 tokens
"""Names the blocks of the prompt once, and those of the answer never. The next turn of a chat computes it again.

What a chat's next prompt repeats is mostly the answers before: R6.8 wants them cached like prompts.
"""

from folovllm.core.block_hash import extra_keys, pack_tokens
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.request import Request


class HashPrefixIndex(Reference):
    def hash_new_blocks(self, request: Request) -> None:
        if request.output_token_ids:
            return
        for i in range(len(request.block_hashes), request.num_tokens // self.block_size):
            tokens = pack_tokens(request.all_token_ids[i * self.block_size : (i + 1) * self.block_size])
            parent, extra = (request.block_hashes[-1], b"") if i else (self.hasher.root, extra_keys(request))
            request.block_tokens.append(tokens)
            request.block_hashes.append(self.hasher.hash_function(parent + tokens + extra))
