"""What a fix of case 3 must do."""

from pathlib import Path

from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.learn.cases import load_case, run_requests
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


def first_wrong_step() -> int:
    """The step in which the attention is first told another length. The token that is wrong comes later."""
    case = load_case(Path(__file__).parent)
    good, faulty = (run_requests(parts, case.workload).batches for parts in (case.good, case.fault))
    return next(i for i, (a, b) in enumerate(zip(good, faulty, strict=True)) if a.seq_lens != b.seq_lens)


@check("unit", spec="R5.16")
def seq_lens_end_with_the_chunk(mine: Mine) -> None:
    """The attention of a chunk reads the slots up to the end of the chunk."""
    args = {"block_size": 4, "num_kv_blocks": 9, "max_num_batched_tokens": 5, "enable_chunked_prefill": True}
    core = make_engine(mine.parts, **args)
    prompt = list(range(30, 41))
    tokens = generate(core, [make_request("r", prompt, max_tokens=1)])["r"]
    seq_lens = [batch.seq_lens[0] for batch in core.executor.batches]  # type: ignore[attr-defined]
    assert seq_lens == [5, 10, 11], (
        f"a prompt of 11 tokens in chunks of 5 was read with lengths {seq_lens}; the chunks end at 5, 10 and 11, and "
        "what lies behind them is not written"
    )
    assert tokens == alone(prompt, 1), f"it was answered with {tokens}, and without chunks with {alone(prompt, 1)}"
