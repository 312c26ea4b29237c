"""min_p, top_k, top_p and the draw on a short list of tokens instead of the whole vocabulary, with the same answer.

Milestone: M4. vLLM counterpart: none on a CPU; on a GPU the FlashInfer kernels behind
vllm/v1/sample/ops/topk_topp_sampler.py spare the sort, too. Left out: keeping the list between steps.

`ops/topk_topp.py` defines the truncations and applies them to all V tokens, but sorting 32 such rows is more work than
running the whole model. Usually the distribution is so peaked that only a few dozen tokens survive top_p. So this file
takes the 256 largest logits of each row and decides there. The result is *exact*, not an approximation, because each
step also proves, per row, that no token outside of the list could have changed it:

    min_p   the threshold is above the least likely token of the list: everything outside is below it, too
    top_k   the k-th largest logit is above the smallest of the list: everything that ties with it is on the list
    top_p   the mass outside plus that of the list's lower end is at most 1 - p: the crossing happens on the list
    draw    everything outside has been removed (the row is *closed*); the noise is keyed by token id, so the clocks of
            the few that are left ring exactly when they would have rung in the full race

A row without a proof (a flat distribution, a large k, a sum so close to 1 - p that rounding decides) is left as it is
from there on, and its draw is -1. The sampler draws such a row again from the start, by the definitions of
`ops/topk_topp.py`. tests/m4 compares the two, bit for bit. No operator here has a size that depends on values, so on a
GPU nothing waits: the host learns of a -1 when it gets the ids of the step, for which it waits anyway.

Where the C++ operators are loaded, csrc/sampling.cpp does all of this faster, on flat rows too. The list is for GPUs
and machines without a compiler.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from folovllm.sample.ops import topk_topp
from folovllm.sample.ops.masks import NEG_INF
from folovllm.sample.ops.noise import exponential_noise_for
from folovllm.sample.ops.select import largest
from folovllm.transfers import to_device

SHORTLIST_SIZE = 256
# softmax is computed to a few units in the last place (2^-23): only beyond this factor is "larger logit" surely "larger
# probability".
_PROB_MARGIN = 1 + 1e-5
# torch sums float32 in a cascade: an element goes through about 100 additions, each off by at most 2^-24 of the sum.
_TAIL_ERROR = 1e-5


@dataclass
class Shortlist:
    """The largest logits of each row of a batch. Their ids ascend, so ties are resolved as in the full row."""

    ids: torch.Tensor  # [R, K] int64
    floor: torch.Tensor  # [R] the smallest logit of the list; no token outside was larger
    closed: torch.Tensor  # [R] bool: every token outside is -inf
    usable: torch.Tensor  # [R] bool; stays False once a step could not be proven
    untruncated: Sequence[int] = ()  # rows that no step truncates; they draw from all tokens

    @classmethod
    def build(cls, logits: torch.Tensor, untruncated: Sequence[int] = ()) -> "Shortlist":
        """Builds the list from `logits [R, V]`, after the temperature."""
        size = min(SHORTLIST_SIZE, logits.shape[-1])
        values, ids = largest(logits, size, in_order=False)  # [R, K], [R, K]
        floor = values.amin(dim=-1)  # [R]
        closed = floor == NEG_INF if size < logits.shape[-1] else torch.ones_like(floor, dtype=torch.bool)  # [R]
        usable = values.amax(dim=-1).isfinite()  # [R]; inf and NaN (the largest of all) have no probabilities
        return cls(ids.sort(dim=-1).values, floor, closed, usable, untruncated)

    def apply_min_p_(self, logits: torch.Tensor, min_p: torch.Tensor) -> None:
        """Does what `topk_topp.apply_min_p_` does to `logits [R, V]`."""
        probs = logits.softmax(dim=-1)  # [R, V]
        listed = probs.gather(1, self.ids)  # [R, K]
        threshold = min_p * probs.amax(dim=-1)  # [R]
        proven = self.closed | (listed.amin(dim=-1) * _PROB_MARGIN < threshold)  # [R]
        keep = ~(listed < threshold.unsqueeze(1))  # [R, K]
        self._finish_(logits, min_p > 0, proven, keep)

    def apply_top_k_(self, logits: torch.Tensor, top_k: torch.Tensor, max_top_k: int) -> None:
        """Does what `topk_topp.apply_top_k_` does to `logits [R, V]`. `max_top_k` does not matter to a list."""
        listed = logits.gather(1, self.ids)  # [R, K]
        size = listed.shape[1]
        descending = listed.sort(dim=-1, descending=True).values  # [R, K]
        threshold = descending.gather(1, top_k.clamp(max=size).unsqueeze(1) - 1).squeeze(1)  # [R]
        # If k > K, that is the smallest of the list: there is no proof, and a closed row loses nothing.
        proven = self.closed | (self.floor < threshold)  # [R]
        keep = ~(listed < threshold.unsqueeze(1))  # [R, K]
        self._finish_(logits, top_k < logits.shape[-1], proven, keep)

    def apply_top_p_(self, logits: torch.Tensor, top_p: torch.Tensor) -> None:
        """Does what `topk_topp.apply_top_p_` does to `logits [R, V]`, with running sums that start with the mass of the
        tail.
        """
        probs = logits.softmax(dim=-1)  # [R, V]
        listed, order = probs.gather(1, self.ids).sort(dim=-1, stable=True)  # [R, K], ascending
        tail = probs.scatter_(1, self.ids, 0.0).sum(dim=-1, keepdim=True).double()  # [R, 1], mass outside
        mass = tail + listed.cumsum(dim=-1, dtype=torch.float64)  # [R, K]
        limit = (1 - top_p).unsqueeze(1)  # [R, 1]
        keep, sure = topk_topp.mass_exceeds(mass, limit, error=tail * _TAIL_ERROR)  # [R, K], [R, K]
        keep[:, -1].fill_(True)  # the likeliest stays, however small p is
        # The kept one that is least likely must be above the list's end, or its equals may stand outside.
        crossing = listed.gather(1, keep.long().argmax(dim=-1, keepdim=True)).squeeze(1)  # [R]
        on_the_list = self.closed | (crossing > listed[:, 0] * _PROB_MARGIN)  # [R]
        proven = on_the_list & sure.all(dim=-1)  # [R]
        keep = torch.zeros_like(keep).scatter_(1, order, keep)  # back to the order of ids
        self._finish_(logits, top_p < 1, proven, keep)

    def _finish_(self, logits: torch.Tensor, on: torch.Tensor, proven: torch.Tensor, keep: torch.Tensor) -> None:
        """Edits the rows of `logits [R, V]` by `keep [R, K]` if the step is on and proven. `on`, `proven`: bool `[R]`.

        Such a row keeps nothing outside of the list. The others keep every bit.
        """
        self.usable = self.usable & (proven | ~on)  # [R]
        edited = on & self.usable  # [R]
        self.closed = self.closed | edited  # [R]
        removed = edited.unsqueeze(1) & ~keep  # [R, K]
        kept = logits.gather(1, self.ids).masked_fill_(removed, NEG_INF)  # [R, K]
        cap = self.floor.new_full(edited.shape, math.inf).masked_fill_(edited, NEG_INF)  # [R]
        logits.clamp_(max=cap.unsqueeze(1))  # masked_fill_ does the same, six times slower on a CPU
        logits.scatter_(1, self.ids, kept)

    def random_sample(self, probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
        """Draws as `topk_topp.random_sample` does for `probs [R, V]`, for closed rows from the list alone.

        Returns `[R]`: a token id, or -1 if a step was not proven. What a greedy row gets is meaningless.
        """
        race = probs.gather(1, self.ids) / exponential_noise_for(seeds, output_indices, self.ids)  # [R, K]
        drawn = self.ids.gather(1, race.argmax(dim=-1, keepdim=True)).squeeze(1)  # [R]; the first is the lowest id
        drawn.masked_fill_(~(self.closed & self.usable), -1)
        if self.untruncated:
            rows = to_device(self.untruncated, probs.device)  # [n]
            key = [seeds[i] for i in self.untruncated], [output_indices[i] for i in self.untruncated]
            drawn.index_copy_(0, rows, topk_topp.random_sample(probs[rows], *key))
        return drawn
