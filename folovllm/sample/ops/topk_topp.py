"""Shaping and drawing from the distribution: temperature, min_p, top_k, top_p, and the draw itself.

Milestone: M1. vLLM counterpart: vllm/v1/sample/ops/topk_topp_sampler.py.
Left out: avoiding the full sort (M4), FlashInfer's rejection sampling.

A language model puts a little probability on every one of 50,000 tokens; together the thousands of absurd ones may
hold several percent, enough to derail a text once in a while. The three truncations cut that tail off, each by another
rule, always keeping the most likely token; what remains is renormalised by the final softmax. They are chained: min_p
sees the full distribution, top_p only what min_p and top_k left over.

A row where a truncation is off passes through unchanged, bit for bit: a request's tokens must not depend on what its
batch mates asked for. Functions named `..._` change `logits` in place.
"""

from collections.abc import Sequence

import torch

from folovllm.sample.ops.masks import NEG_INF
from folovllm.sample.ops.noise import exponential_noise
from folovllm.sampling_params import GREEDY_EPSILON


def apply_temperature_(logits: torch.Tensor, temperature: torch.Tensor) -> None:
    """Divide `logits [R, V]` by `temperature [R]`. Below 1 sharpens (differences grow), above 1 flattens.

    Greedy rows (temperature 0) are divided by 1: they are here only because a batch mate is random, and the result of
    their draw is thrown away.
    """
    logits /= torch.where(temperature < GREEDY_EPSILON, 1.0, temperature).unsqueeze(1)


def apply_min_p_(logits: torch.Tensor, min_p: torch.Tensor) -> None:
    """Remove tokens less likely than `min_p [R]` times the likeliest; 0 turns it off. `logits`: `[R, V]`.

    Worked example: probabilities [0.5, 0.3, 0.15, 0.05], min_p 0.2 -> threshold 0.2 * 0.5 = 0.1 -> the last one goes.
    Adapts to confidence: a peaked distribution keeps few tokens, a flat one many.
    """
    probs = logits.softmax(dim=-1)  # [R, V]
    threshold = min_p.unsqueeze(1) * probs.amax(dim=-1, keepdim=True)  # [R, 1]
    logits.masked_fill_(probs < threshold, NEG_INF)


def apply_top_k_(logits: torch.Tensor, top_k: torch.Tensor, max_top_k: int) -> None:
    """Keep the k most likely tokens of each row, and all that tie with the k-th. `logits`: `[R, V]`.

    Args:
        top_k: int64 `[R]`, in 1..V; V turns it off.
        max_top_k: the largest k of the rows where it is on, known on the host so that no device sync is needed.

    Worked example: logits [4, 3, 3, 1], k = 2 -> the 2nd largest is 3 -> drop what is < 3 -> [4, 3, 3, -inf].
    """
    vocab_size = logits.shape[-1]
    largest = logits.topk(max_top_k, dim=-1).values  # [R, max_top_k], descending
    threshold = largest.gather(1, top_k.clamp(max=max_top_k).unsqueeze(1) - 1)  # [R, 1]
    threshold.masked_fill_((top_k >= vocab_size).unsqueeze(1), NEG_INF)  # nothing is below -inf
    logits.masked_fill_(logits < threshold, NEG_INF)


def apply_top_p_(logits: torch.Tensor, top_p: torch.Tensor) -> None:
    """Keep the smallest set of most likely tokens whose probabilities reach `top_p [R]`; 1 turns it off.

    Sorted from the least likely up, a token goes when it and everything below it hold at most 1 - p. The token that
    *crosses* p therefore stays. Among equal probabilities the higher token ids stay (the sort is stable).

    Worked example: probabilities [0.5, 0.3, 0.15, 0.05], p = 0.7 -> ascending cumulative sums [0.05, 0.2, 0.5, 1.0]
    -> those <= 0.3 go, that is 0.05 and 0.15 -> [0.5, 0.3] stay (0.5 alone has not reached 0.7).
    """
    probs, order = logits.softmax(dim=-1).sort(dim=-1, stable=True)  # [R, V], ascending; order: its token ids
    p = top_p.unsqueeze(1)  # [R, 1]
    remove = (probs.cumsum(dim=-1) <= 1 - p) & (p < 1)  # [R, V]
    remove[:, -1] = False  # the likeliest stays, however small p is
    logits.masked_fill_(torch.zeros_like(remove).scatter_(1, order, remove), NEG_INF)


def apply_top_k_top_p_(
    logits: torch.Tensor, top_k: torch.Tensor | None, max_top_k: int, top_p: torch.Tensor | None
) -> None:
    """top_k, then top_p on what is left. None skips a step."""
    if top_k is not None:
        apply_top_k_(logits, top_k, max_top_k)
    if top_p is not None:
        apply_top_p_(logits, top_p)


def random_sample(probs: torch.Tensor, seeds: Sequence[int], output_indices: Sequence[int]) -> torch.Tensor:
    """Draw one token per row of `probs [R, V]` by the exponential race of ops/noise.py. Returns `[R]`.

    `probs` need not sum to 1: a common factor moves all clocks alike.
    """
    noise = exponential_noise(seeds, output_indices, probs.shape[-1], probs.device)  # [R, V]
    return (probs / noise).argmax(dim=-1)
