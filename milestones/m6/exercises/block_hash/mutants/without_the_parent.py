# killed-by: the_parent_matters | behind 1 2 3 4 and behind 4 3 2 1
"""Names a block by its own tokens. The same words behind another beginning then hit keys and values of another text.

K and V depend on every token before theirs, so this gives fluent, wrong answers. vLLM pull 12603 mended a relative:
what the parents differed in (their images) was not in the name of the blocks behind them.
"""

from folovllm.core.block_hash import extra_keys, pack_tokens
from folovllm.core.prefix_index import HashPrefixIndex as Reference
from folovllm.request import Request


class HashPrefixIndex(Reference):
    def hash_new_blocks(self, request: Request) -> None:
        for i in range(len(request.block_hashes), request.num_tokens // self.block_size):
            tokens = pack_tokens(request.all_token_ids[i * self.block_size : (i + 1) * self.block_size])
            parent, extra = self.hasher.root, extra_keys(request)
            request.block_tokens.append(tokens)
            request.block_hashes.append(self.hasher.hash_function(parent + tokens + extra))
