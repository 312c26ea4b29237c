"""Shaping and drawing from the distribution: temperature, min_p, top_k, top_p, and the draw itself.

Milestone: M1. vLLM counterpart: vllm/v1/sample/ops/topk_topp_sampler.py.
Left out: FlashInfer's rejection sampling. Avoiding the full sort: M4's ops/shortlist.py, and csrc/sampling.cpp.

A language model gives every one of 50,000 tokens a little probability. Together the thousands of absurd tokens may hold
several percent, enough to derail a text once in a while. The three truncations remove that tail, each by another rule.
They always keep the most likely token, and the final softmax renormalises what remains. They are chained: min_p sees
the full distribution, top_p only what min_p and top_k left over.

A row where a truncation is off passes through unchanged, bit for bit, because the tokens of a request must not depend
on the parameters of other requests. Functions named `..._` change `logits` in place.
"""

from collections.abc import Sequence

import torch

from folovllm.sample.ops.masks import NEG_INF
from folovllm.sample.ops.noise import exponential_noise
from folovllm.sample.ops.select import first_argmax, largest
from folovllm.sampling_params import GREEDY_EPSILON

_SUM_ERROR = 1e-10  # n * 2^-53, the worst case of a float64 sum of n probabilities, for n up to 900,000


def apply_temperature_(logits: torch.Tensor, temperature: torch.Tensor) -> None:
    """Divides `logits [R, V]` by `temperature [R]`. Below 1 sharpens (differences grow), above 1 flattens.

    Greedy rows (temperature 0) are divided by 1. They are here only because another row of the batch draws, and the
    result of their own draw is discarded.
    """
    logits /= temperature.masked_fill(temperature < GREEDY_EPSILON, 1.0).unsqueeze(1)


def apply_min_p_(logits: torch.Tensor, min_p: torch.Tensor) -> None:
    """Removes tokens that are less likely than `min_p [R]` times the most likely one; 0 turns it off. `logits`: `[R,
    V]`.

    Worked example: probabilities [0.5, 0.3, 0.15, 0.05], min_p 0.2 -> threshold 0.2 * 0.5 = 0.1 -> the last one goes.
    The threshold adapts to the distribution: a peaked one keeps few tokens, a flat one many.
    """
    probs = logits.softmax(dim=-1)  # [R, V]
    threshold = min_p.unsqueeze(1) * probs.amax(dim=-1, keepdim=True)  # [R, 1]
    logits.masked_fill_(probs < threshold, NEG_INF)


def apply_top_k_(logits: torch.Tensor, top_k: torch.Tensor, max_top_k: int) -> None:
    """Keeps the k most likely tokens of each row, and all that tie with the k-th. `logits`: `[R, V]`.

    Args:
        top_k: int64 `[R]`, in 1..V; V turns it off.
        max_top_k: the largest k of the rows where it is on, known on the host so that no device sync is needed.

    Worked example: logits [4, 3, 3, 1], k = 2 -> the 2nd largest is 3 -> drop what is < 3 -> [4, 3, 3, -inf].
    """
    vocab_size = logits.shape[-1]
    descending, _ = largest(logits, max_top_k)  # [R, max_top_k]
    threshold = descending.gather(1, top_k.clamp(max=max_top_k).unsqueeze(1) - 1)  # [R, 1]
    threshold.masked_fill_((top_k >= vocab_size).unsqueeze(1), NEG_INF)  # nothing is below -inf
    logits.masked_fill_(logits < threshold, NEG_INF)


def apply_top_p_(logits: torch.Tensor, top_p: torch.Tensor) -> None:
    """Keeps the smallest set of most likely tokens whose probabilities reach `top_p [R]`; 1 turns it off.

    Sorted from the least likely up, a token goes when it and everything below it hold at most 1 - p. The token that
    *crosses* p therefore stays. Among equal probabilities the higher token ids stay (the sort is stable).

    Worked example: probabilities [0.5, 0.3, 0.15, 0.05], p = 0.7 -> ascending cumulative sums [0.05, 0.2, 0.5, 1.0] ->
    those <= 0.3 go, that is 0.05 and 0.15 -> [0.5, 0.3] stay (0.5 alone has not reached 0.7).
    """
    by_device = _top_p_of_each_row_ if logits.device.type == "cpu" else _top_p_of_all_rows_
    by_device(logits, top_p)


def _top_p_of_each_row_(logits: torch.Tensor, top_p: torch.Tensor) -> None:
    """Runs `apply_top_p_` row by row, so that a CPU has to sort only few tokens. On a GPU, each row would be a wait."""
    probs = logits.softmax(dim=-1)  # [R, V]
    limits = 1 - top_p  # [R]
    for row in (top_p < 1).nonzero().squeeze(1).tolist():
        keep = _nucleus(probs[row], limits[row])  # [V]
        if keep is None:
            keep = nucleus_by_sorting(probs[row], limits[row])
        logits[row].masked_fill_(~keep, NEG_INF)


def _top_p_of_all_rows_(logits: torch.Tensor, top_p: torch.Tensor) -> None:
    """Runs `apply_top_p_` by sorting all rows, for a GPU: the host does not wait for anything."""
    keep = nucleus_by_sorting(logits.softmax(dim=-1), 1 - top_p)  # [R, V]
    keep |= (top_p >= 1).unsqueeze(1)
    logits.masked_fill_(~keep, NEG_INF)


def nucleus_by_sorting(probs: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Returns which tokens of `probs [..., V]` top_p keeps if up to `limit [...]` may go, by definition. Bool, `[...,
    V]`.

    On a CPU, a float32 cumsum runs in float64 and rounds each sum to float32. A GPU has to be told to do the same.
    """
    ascending, order = probs.sort(dim=-1, stable=True)  # [..., V], [..., V]; order: the token ids
    keep = ascending.cumsum(dim=-1, dtype=torch.float64).float() > limit.unsqueeze(-1)  # [..., V]
    keep[..., -1].fill_(True)  # the likeliest stays, however small p is
    return torch.empty_like(keep).scatter_(-1, order, keep)


def _nucleus(probs: torch.Tensor, limit: torch.Tensor) -> torch.Tensor | None:
    """Returns the same, but sorts only a few tokens. Returns None if rounding would decide.

    Positive floats are ordered like their bits. So the upper 16 bits (exponent and 7 bits of mantissa) put the tokens
    into buckets of nearly equal probability, in order. The masses of the buckets tell in which bucket the sum crosses
    the limit: the buckets below go, those above stay, and only the tokens inside are sorted.
    """
    buckets = probs.view(torch.int32) >> 16  # [V]
    mass = torch.bincount(buckets, weights=probs.double()).cumsum(dim=0)  # [B] of all tokens up to this bucket
    crossing = torch.searchsorted(mass, limit.double(), right=True).clamp(
        max=len(mass) - 1
    )  # the first above the limit
    inside = (buckets == crossing).nonzero().squeeze(1)  # [n], ascending ids
    ascending, order = probs[inside].sort(stable=True)  # [n], [n]
    below = mass[crossing - 1] if crossing > 0 else mass.new_zeros(())
    running = torch.cat([below.unsqueeze(0), below + ascending.cumsum(dim=0, dtype=torch.float64)])  # [1 + n]
    exceeds, sure = mass_exceeds(running, limit)  # [1 + n], [1 + n]
    if not sure.all() or exceeds[0] or not exceeds[-1]:
        return None
    keep = buckets > crossing  # [V]
    keep[inside[order]] = exceeds[1:]
    return keep


def mass_exceeds(
    mass: torch.Tensor, limit: torch.Tensor, error: torch.Tensor | float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns whether sums of probabilities exceed a limit, and whether the order of summation cannot change that.

    `nucleus_by_sorting` adds in float64, from the smallest up, and rounds to float32. Here the same numbers are added
    in another order, which changes a sum by less than 1e-10. The answer is sure if shifting the sum by that much
    changes nothing after the rounding.

    Args:
        mass: float64.
        limit: float32, of a shape that broadcasts.
        error: how wrong `mass` may be beyond that.
    """
    error = error + _SUM_ERROR
    low, high = (mass - error).float() > limit, (mass + error).float() > limit
    return low, low == high


def random_sample(probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
    """Draws one token per row of `probs [R, V]` by the exponential race of ops/noise.py. Returns `[R]`.

    `probs` need not sum to 1: a common factor changes all times alike.
    """
    return race(probs, exponential_noise(seeds, output_indices, probs.shape[-1], probs.device))


def race(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Returns the token of each row whose clock rings first, `[R]`. `probs` and `noise` are `[R, V]`.

    `noise` is used up: it holds the quotients afterwards.
    """
    return first_argmax(torch.div(probs, noise, out=noise))
