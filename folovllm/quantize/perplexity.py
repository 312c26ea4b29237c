"""Perplexity: e to the mean negative log probability of a text's tokens, in windows that are stated.

Milestone: M7. vLLM counterpart: none (lm-eval runs on top of it). Two perplexities can be compared only if tokens,
window and stride are the same, because in a longer window each token has more context.

    window 4, stride 2 over 8 tokens; * is scored, . is context
    [. * * *]            the very first token is never scored, because it has no context
         [. . * *]
             [. . * *]
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from folovllm.attention.backend import AttentionMetadata
from folovllm.forward_context import set_forward_context
from folovllm.hf_config import load_hf_config
from folovllm.model_executor.model_loader import load_model
from folovllm.quantize.layerwise import bind_no_cache

_ROWS = 256  # logits at a time: [256, 49152] in fp32 is 48 MiB
# score(token_ids, first): log probabilities of token_ids[first:], given what stands before each; [n - first] fp32.
Scorer = Callable[[Sequence[int], int], torch.Tensor]


@dataclass(frozen=True)
class Perplexity:
    perplexity: float
    num_tokens: int  # that were scored
    window: int
    stride: int


def score_windows(num_tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Returns (start, end, first scored) triples that score every token but the first once. E.g. 8, 4, 2 as drawn
    above.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride must be at least 1 and less than the window of {window}; got {stride}")
    windows, scored = [], 1
    for start in range(0, num_tokens, stride):
        end = min(start + window, num_tokens)
        if end > scored:
            windows.append((start, end, scored))
            scored = end
        if end == num_tokens:
            break
    return windows


def measure_perplexity(
    score: Scorer, token_ids: Sequence[int], window: int, stride: int, show: Callable[[int], None] = lambda n: None
) -> Perplexity:
    """Returns the perplexity of `token_ids`. After each window, `show` gets the number of tokens scored so far."""
    total, count = 0.0, 0
    for start, end, first in score_windows(len(token_ids), window, stride):
        logprobs = score(token_ids[start:end], first - start)
        total, count = total + float(logprobs.double().sum()), count + len(logprobs)
        show(count)
    if count == 0:
        raise ValueError("the text has fewer than two tokens: nothing to score")
    return Perplexity(math.exp(-total / count), count, window, stride)


def engine_scorer(folder: Path, dtype: torch.dtype = torch.float32, quantization: str = "dequantize") -> Scorer:
    """Returns a scorer that runs our model of `folder` on each window at once, without a KV cache."""
    arch = load_hf_config(folder)
    model = load_model(folder, arch, dtype, torch.device("cpu"), quantization=quantization)
    bind_no_cache(model, arch, dtype)

    @torch.inference_mode()
    def score(token_ids: Sequence[int], first: int) -> torch.Tensor:
        ids = torch.tensor(token_ids)
        offset = arch.rope.position_offset(len(ids), arch.max_context_len)
        with set_forward_context(AttentionMetadata.single_sequence(len(ids))):
            hidden = model(ids, torch.arange(len(ids)) + offset)  # [n, hidden_size]
        rows = hidden[first - 1 : -1].split(_ROWS)
        targets = ids[first:].split(_ROWS)
        return torch.cat([target_logprobs(model.compute_logits(r), t) for r, t in zip(rows, targets, strict=True)])

    return score


def target_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the log probabilities of `targets` [n] under `logits` [n, vocab_size], as [n] fp32."""
    logits = logits.float()
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
