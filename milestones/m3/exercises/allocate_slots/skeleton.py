"""m3/allocate_slots: give a request the blocks that its next tokens need. The reference supplies the rest."""

from collections.abc import Sequence

from folovllm.core.kv_cache_manager import KVCacheManager as Reference
from folovllm.core.kv_cache_utils import KVCacheBlock
from folovllm.request import Request


class KVCacheManager(Reference):
    def num_new_blocks(self, num_slots: int, num_held: int) -> int:
        """Returns how many blocks `num_slots` slots need beyond the `num_held` blocks that are there; never below 0."""
        raise NotImplementedError("m3/allocate_slots: num_new_blocks")

    def fits(self, num_slots: int, num_held: int, hits: Sequence[KVCacheBlock]) -> bool:
        """Whether enough blocks are free for the new blocks and for those of `hits` that no request holds."""
        raise NotImplementedError("m3/allocate_slots: fits")

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock] = (),
        full_sequence_must_fit: bool = False,
        num_new_computed_tokens: int | None = None,
    ) -> list[KVCacheBlock] | None:
        """Returns the new blocks that `num_new_tokens` more tokens need, or None, with nothing changed.

        An empty list is success. `new_computed_blocks` are prefix hits that hold `num_new_computed_tokens` tokens
        (None: all their slots). `full_sequence_must_fit`: also None if the whole known sequence would not fit.
        Raises ValueError if num_new_tokens is below 1.
        """
        raise NotImplementedError("m3/allocate_slots: allocate_slots")

    def free(self, request: Request) -> None:
        """Gives the blocks of `request` back to the pool, last block first. A second call does nothing."""
        raise NotImplementedError("m3/allocate_slots: free")
