"""What a fix of case 4 must do."""

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.learn.check import Mine, check
from folovllm.learn.toy_engine import make_request
from folovllm.learn.toy_runner import alone, generate, make_engine

VARIANTS = {"an engine that hands out blocks in another order": {"core.block_pool": "checks.py:Backwards"}}


class Backwards(BlockPool):
    """Hands out the block that was freed last, or the one with the highest number."""

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        blocks = self.free_block_queue.popleft_n(self.get_num_free_blocks())
        self.free_block_queue.append_n(blocks[::-1])
        return super().get_new_blocks(num_blocks)


@check("unit", spec="R1.16")
def token_by_token_is_all_at_once(mine: Mine) -> None:
    """Positions begin at 0 and rise by one, whether a step computes a whole prompt or one token."""
    core = make_engine(mine.parts, block_size=16, num_kv_blocks=4, max_num_seqs=1)
    tokens = generate(core, [make_request("r", [7, 7, 7, 7], max_tokens=4)])["r"]
    positions = [batch.positions for batch in core.executor.batches]  # type: ignore[attr-defined]
    assert positions == [[0, 1, 2, 3], [4], [5], [6]], (
        f"a prompt of 4 tokens and 3 decodes were computed at the positions {positions}, expected 0 to 3, then 4, 5, 6"
    )
    assert tokens == alone([7, 7, 7, 7], 4), f"the tokens are {tokens}, computed at once {alone([7, 7, 7, 7], 4)}"
