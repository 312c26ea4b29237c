"""Logprobs of a step: those of the given token and of the most likely ones, ranked on the device of the logits.

Milestone: M1. vLLM counterparts: `LogprobsTensors` in vllm/v1/outputs.py, and `gather_logprobs` of
vllm/v1/sample/sampler.py. Left out: logprobs of chosen token ids.

`rank_logprobs` only puts work into the queue of a GPU. `logprobs_to_lists` reads the results once they are on the host,
so that the sampler can bring them over together with the sampled ids, in one wait.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from folovllm.outputs import TokenLogprobs
from folovllm.sample.ops.select import largest
from folovllm.transfers import to_host

_RANKED_ROWS = 64  # rows ranked at a time: the scratch memory for a long prompt at once would take gigabytes
_SPARE = 59  # how many more tokens than wanted a CPU examines, for ties


@dataclass(frozen=True)
class RankedLogprobs:
    """What is reported of n rows. The largest count is computed for all of them, and each row takes its share."""

    token_ids: torch.Tensor  # [n, 1 + max(counts)] int64: the given token, then the most likely ones
    logprobs: torch.Tensor  # [n, 1 + max(counts)] float32
    ranks: torch.Tensor  # [n] int64, of the given tokens
    counts: Sequence[int]  # [n] how many of the most likely tokens to report

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.token_ids, self.logprobs, self.ranks]


def rank_logprobs(logprobs: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int]) -> list[RankedLogprobs]:
    """Collects the logprob and rank of one given token per row, and those of the most likely tokens.

    The rank of the given token is the number of entries >= its own, so the most likely token has rank 1 and ties
    increase the rank. The most likely ones follow in order, lower ids first among equals; the given token may be among
    them.

    E.g. logprobs [-2, -1, -3, -2], token 0, count 2 -> token_ids [0, 1, 0], logprobs [-2, -1, -2], rank 3.

    Args:
        logprobs: `[n, V]` float32.
        token_ids: the given tokens, integers `[n]`. -1 stands for a token that is not known yet; what its row reports
            is meaningless.
        counts: how many of the most likely tokens to report, per row; at most V.

    Returns: the rows in groups of at most 64.
    """
    assert len(logprobs) == len(token_ids) == len(counts), (len(logprobs), len(token_ids), len(counts))
    groups = [slice(start, start + _RANKED_ROWS) for start in range(0, len(counts), _RANKED_ROWS)]
    return [_rank_group(logprobs[g], token_ids[g], counts[g]) for g in groups]


def logprobs_to_host(ranked: Sequence[RankedLogprobs]) -> list[TokenLogprobs]:
    """Returns all groups as lists, one entry per row. On a GPU the host waits once for all of them."""
    return logprobs_to_lists(ranked, iter(to_host(*(t for group in ranked for t in group.tensors))))


def logprobs_to_lists(ranked: Sequence[RankedLogprobs], on_host: Iterable[torch.Tensor]) -> list[TokenLogprobs]:
    """Returns the same, given the `tensors` of all groups on the host."""
    lists = iter([tensor.tolist() for tensor in on_host])
    return [
        TokenLogprobs(token_ids=ids[: k + 1], logprobs=values[: k + 1], rank=rank)
        for group in ranked
        for ids, values, rank, k in zip(next(lists), next(lists), next(lists), group.counts, strict=True)
    ]


def _rank_group(logprobs: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int]) -> RankedLogprobs:
    given = token_ids.to(torch.int64).clamp(min=0).unsqueeze(1)  # [n, 1]
    given_logprobs = logprobs.gather(1, given)  # [n, 1]
    ranks = (logprobs >= given_logprobs).sum(dim=-1)  # [n]
    most_likely = _most_likely_on_cpu if logprobs.device.type == "cpu" else _most_likely_by_key
    max_k = max(counts)
    top_ids = most_likely(logprobs, max_k) if max_k > 0 else given[:, :0]  # [n, max_k]
    ids = torch.cat([given, top_ids], dim=1)  # [n, 1 + max_k]
    values = torch.cat([given_logprobs, logprobs.gather(1, top_ids)], dim=1)  # [n, 1 + max_k]
    return RankedLogprobs(ids, values, ranks, counts)


# Both functions below return the ids of the k largest entries per row, in descending order, lower ids first among
# equals: `[n, V]` to `[n, k]`. `topk` alone does not specify which of several equal entries it returns, and its choice
# changes with k. Equal logits are common (bf16 has 8 bits of precision), and k is the largest that any row wants, so a
# row's list would depend on the rest of the batch.


def _most_likely_on_cpu(logprobs: torch.Tensor, k: int) -> torch.Tensor:
    """Takes a few more than k, puts them in the order of their ids, and sorts stably.

    If the last of them is smaller than the k-th, every entry that ties with the k-th is included. The other rows are
    ranked as a whole. A GPU would have to wait to know which rows these are.
    """
    size = min(k + _SPARE, logprobs.shape[-1])
    values, ids = largest(logprobs, size)  # [n, size], [n, size]
    ids = ids.sort(dim=-1).values  # [n, size]
    order = logprobs.gather(1, ids).sort(dim=-1, descending=True, stable=True).indices  # [n, size]
    top_ids = ids.gather(1, order[:, :k])  # [n, k]
    tied = (values[:, -1] == values[:, k - 1]).nonzero().squeeze(1)  # [m]
    if tied.numel() > 0 and size < logprobs.shape[-1]:
        top_ids[tied] = logprobs[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return top_ids


def _most_likely_by_key(logprobs: torch.Tensor, k: int) -> torch.Tensor:
    """Gives every entry a key of its own, an integer of 64 bits: first the value, then the id. So there are no ties.

    The bits of a float, read as an integer, are in the order of the values if it is positive, and in the opposite order
    if it is negative. Inverting all bits but the sign turns that order around. E.g. -2.0, -1.0, 1.0, 2.0 have the bits
    0xC0000000, 0xBF800000, 0x3F800000, 0x40000000, whose keys ascend: -0x40000001, -0x3F800001, 0x3F800000, 0x40000000.
    """
    bits = (logprobs.float() + 0.0).view(torch.int32)  # [n, V]; -0.0 + 0.0 is 0.0: the two are equal
    by_value = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # [n, V]
    ids = torch.arange(logprobs.shape[-1], device=logprobs.device)  # [V]
    keys = (by_value.to(torch.int64) << 32) - ids  # [n, V]
    return largest(keys, k)[1]  # [n, k]
