"""Random numbers without a random number generator: noise as a function of (seed, output index, token id).

Milestone: M1. vLLM counterpart: `q.exponential_()` in vllm/v1/sample/ops/topk_topp_sampler.py (a `torch.Generator` per
seeded request); its newer GPU runner keys Gumbel noise by (seed, position), which is the idea used here.
Left out: evaluating the hash inside a fused kernel.

**How a token is drawn.** We want token i with probability p_i. Give every token an alarm clock that rings at a random
time q_i / p_i, where q_i is exponentially distributed with mean 1, so that likely tokens ring early. The probability
that clock i rings first is exactly p_i / sum(p): this is the *exponential race*. "First to ring" is `argmin(q / p)`,
and we compute its reciprocal, `argmax(p / q)`, because a masked token then gets a plain 0. (With logits instead of
probabilities the same trick is called Gumbel-max: -log(q) is Gumbel noise.) One argmax draws for the whole batch,
without a cumulative sum, a search, or a value that must first come back from the device.

**Why the noise is keyed.** A generator has a state that every draw advances, so each number depends on all draws
before it. In a serving engine this causes errors. If all requests share one generator, the tokens of a request depend
on the other requests in its batch. If each request has its own, a draw that is thrown away (because a prompt is not
complete yet, or because the request was preempted) has still advanced the generator, and its state must be restored.
Keyed noise has no state at all: the noise for the 7th output token of seed 42 is a pure function of (42, 7), whenever,
wherever, and however often it is computed. It costs one integer hash per token id, and it can be evaluated for a few
candidate tokens alone.

**The hash.** Per row, Python mixes (seed, output index) into a 64-bit key with splitmix64's finaliser. Per token id, a
32-bit multiply/xor-shift mixer then runs on int32 tensors, with the two halves of the key added at the start and in the
middle. Integer arithmetic wraps modulo 2^32 everywhere, so CPU and GPU agree on every bit of the hash and of the
uniform number; the logarithm at the end may differ in its last bit between devices, as the probabilities do anyway.
"""

from collections.abc import Sequence

import numpy as np
import torch

from folovllm.transfers import to_device

_MASK64 = 2**64 - 1
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24  # the float32 just below 1


def exponential_noise(
    seeds: Sequence[int], output_indices: Sequence[int], vocab_size: int, device: torch.device | str
) -> torch.Tensor:
    """Computes Exp(1) noise for every token id of every row.

    Args:
        seeds: one integer per row, any size (taken modulo 2^64).
        output_indices: per row, how many tokens the request has produced before this one.

    Returns: float32 `[num_rows, vocab_size]`, every value finite and > 0.
    """
    token_ids = torch.arange(vocab_size, dtype=torch.int32, device=device)  # [V]
    return _exponential(_hash(_row_keys(seeds, output_indices, device), token_ids.unsqueeze(0)))  # [R, V]


def exponential_noise_for(seeds: Sequence[int], output_indices: Sequence[int], token_ids: torch.Tensor) -> torch.Tensor:
    """Computes the same noise for chosen token ids only.

    Entry [r, j] equals `exponential_noise(...)[r, token_ids[r, j]]`.

    Args:
        token_ids: integers `[num_rows, K]`.

    Returns: float32 `[num_rows, K]`.
    """
    return _exponential(_hash(_row_keys(seeds, output_indices, token_ids.device), token_ids.to(torch.int32)))  # [R, K]


def random_key(seed: int, output_index: int) -> int:
    """Mixes a seed and an output index into one 64-bit key.

    The seed is mixed *before* the index is added. A plain sum would make (seed, index + 1) and (seed + 1, index) the
    same key, and request n of `n > 1` sampling, which uses seed + n, would repeat the draws of its sibling, shifted by
    one.
    """
    return _splitmix64(_splitmix64(seed & _MASK64) + output_index)


def _splitmix64(x: int) -> int:
    """Runs splitmix64's step: adds the golden-ratio increment (so that 0 does not map to 0), then its 64-bit
    finaliser.
    """
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _row_keys(seeds: Sequence[int], output_indices: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Returns one key per row as two int32 halves, `[num_rows, 2]`."""
    keys = [random_key(s, i) for s, i in zip(seeds, output_indices, strict=True)]
    # Reading each 64-bit key as two int32 splits it into halves without any arithmetic.
    return to_device(np.array(keys, dtype=np.uint64).view(np.int32).reshape(-1, 2), device)  # [R, 2]


def _hash(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Computes 32 well-mixed bits for every (row key, token id).

    It is a bijective mixer in the style of "triple32": three multiplications by odd numbers, each of which carries low
    bits upwards, between xor-shifts that bring high bits down again. The second key half goes in *between*: with the
    first alone, two rows whose keys are close would see the same numbers at neighbouring token ids.

    Args:
        keys: int32 `[R, 2]`.
        token_ids: int32 `[1, K]` or `[R, K]`.

    Returns: int32 `[R, K]`, all 2^32 values possible.
    """
    x = token_ids + keys[:, 0:1]  # [R, K]; int32 addition and multiplication wrap, which is what we want
    scratch = torch.empty_like(x)  # [R, K]; reused: at 32 x 49,152 an allocation costs more than the arithmetic
    _xor_shift_(x, 17, scratch)
    x *= _signed(0xED5AD4BB, 32)
    _xor_shift_(x, 11, scratch)
    x += keys[:, 1:2]
    x *= _signed(0xAC4C1B51, 32)
    _xor_shift_(x, 15, scratch)
    x *= _signed(0x31848BAB, 32)
    _xor_shift_(x, 14, scratch)
    return x


def _xor_shift_(x: torch.Tensor, shift: int, scratch: torch.Tensor) -> None:
    """Computes x ^= x >>> shift in place. torch's >> copies the sign bit downwards, so these copies are cleared after
    it.
    """
    torch.bitwise_right_shift(x, shift, out=scratch)
    scratch &= (1 << (32 - shift)) - 1
    x ^= scratch


def _exponential(bits: torch.Tensor) -> torch.Tensor:
    """Turns hashed bits into Exp(1) noise, q = -log(u) with u uniform in (0, 1). Consumes `bits`.

    The race is decided among the *smallest* q, that is for u close to 1, where float32 is coarse: its step there is
    2^-24, so in a vocabulary of 50,000 several clocks would ring at the same time. We therefore make v = 1 - u from the
    bits, which is fine-grained near 0 (step 2^-31), and take -log(1 - v) with `log1p`, which keeps that precision.
    """
    bits &= 0x7FFFFFFF  # drop the sign: 31 bits
    v = bits.to(torch.float32)
    v += 0.5  # never 0 ...
    v *= 2.0**-31
    v.clamp_(max=_LARGEST_BELOW_ONE)  # ... and never 1 (the largest values round up to it)
    return v.neg_().log1p_().neg_()


def _signed(value: int, bits: int) -> int:
    """Returns the two's complement reading of an unsigned number: torch has no arithmetic on unsigned tensors."""
    return value - (1 << bits) if value >> (bits - 1) else value
