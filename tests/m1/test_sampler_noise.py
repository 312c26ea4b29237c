"""The keyed noise (folovllm/sample/ops/noise.py): right by a scalar reference, and good by statistics.

All inputs are fixed, so every statistic below is one number that either passes for ever or fails for ever.
"""

import math
import struct

import pytest
import torch

from folovllm.sample.ops.noise import _exponential, exponential_noise, exponential_noise_for, random_key

pytestmark = pytest.mark.m1

N = 65_536
KEYS = [(0, 0), (1, 0), (0, 1), (42, 7), (-1, 3), (2**63 - 1, 1000), (-(2**63), 0), (2**64 + 5, 2)]


def uniform(seeds: list[int], indices: list[int], vocab_size: int) -> torch.Tensor:
    """The uniform numbers behind the noise, in float64."""
    return torch.exp(-exponential_noise(seeds, indices, vocab_size, "cpu").double())


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor | float) -> float:
    """Probability of counts at least this uneven when the expectation is true (upper tail of chi-square)."""
    statistic = ((counts.double() - expected) ** 2 / expected).sum()
    df = torch.tensor((counts.numel() - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(df, statistic / 2).item()


def looks_uniform(u: torch.Tensor, bins: int = 64) -> bool:
    counts = torch.bincount((u.flatten() * bins).long().clamp(max=bins - 1), minlength=bins)
    return 1e-3 < chi_square_p(counts, u.numel() / bins) < 1 - 1e-6  # suspiciously even is wrong, too


def looks_independent(a: torch.Tensor, b: torch.Tensor, bins: int = 16) -> bool:
    """No linear correlation (4 standard errors), and all 16 x 16 cells of the pair equally full."""
    r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
    cells = (a.flatten() * bins).long() * bins + (b.flatten() * bins).long()
    counts = torch.bincount(cells, minlength=bins * bins)
    return abs(r) < 4 / math.sqrt(a.numel()) and chi_square_p(counts, a.numel() / bins**2) > 1e-3


def reference_noise(seed: int, index: int, token_id: int) -> float:
    """The documented recipe on plain Python integers: no tensors, no wrapping, no shortcuts."""
    key = random_key(seed, index)
    x = (token_id + (key & 0xFFFFFFFF)) % 2**32
    x ^= x >> 17
    x = x * 0xED5AD4BB % 2**32
    x ^= x >> 11
    x = (x + (key >> 32)) % 2**32
    x = x * 0xAC4C1B51 % 2**32
    x ^= x >> 15
    x = x * 0x31848BAB % 2**32
    x ^= x >> 14
    v = float32((float32(x % 2**31) + 0.5) / 2**31)  # the two roundings that happen to tensors
    return -math.log1p(-min(v, 1 - 2**-24))


def float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


@pytest.mark.parametrize(("seed", "index"), KEYS)
def test_the_noise_equals_a_scalar_reference(seed: int, index: int) -> None:
    noise = exponential_noise([seed], [index], 2000, "cpu")[0]
    expected = torch.tensor([reference_noise(seed, index, t) for t in range(2000)])
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=0)


def test_splitmix64_matches_its_published_first_output() -> None:
    # splitmix64 started at 0 yields 0xE220A8397B1DCDAF; a key mixes twice, so mix the published number once more.
    x = (0xE220A8397B1DCDAF + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    assert random_key(0, 0) == x ^ (x >> 31)


def test_every_bit_pattern_gives_finite_positive_noise() -> None:
    bits = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 2**31 - 100, 12345], dtype=torch.int32)
    noise = _exponential(bits.clone())
    assert torch.isfinite(noise).all() and (noise > 0).all()
    # The extremes: v = 0.5 / 2^31, and u = 2^-24.
    assert noise.min().item() == pytest.approx(2.0**-32)
    assert noise.max().item() == pytest.approx(24 * math.log(2))


@pytest.mark.parametrize("num_rows", [1, 5])
def test_noise_for_chosen_tokens_is_bitwise_the_same(num_rows: int) -> None:
    seeds, indices = list(range(num_rows)), [3 * i for i in range(num_rows)]
    full = exponential_noise(seeds, indices, 5003, "cpu")
    token_ids = torch.randint(0, 5003, (num_rows, 37), generator=torch.Generator().manual_seed(0))
    chosen = exponential_noise_for(seeds, indices, token_ids)
    assert torch.equal(chosen, full.gather(1, token_ids))
    assert torch.equal(exponential_noise_for(seeds, indices, token_ids.int()), chosen)


def test_a_row_does_not_depend_on_the_batch_or_on_the_vocabulary_size() -> None:
    batch = exponential_noise(list(range(33)), list(range(33)), 4999, "cpu")
    for i in (0, 7, 32):
        assert torch.equal(exponential_noise([i], [i], 4999, "cpu")[0], batch[i])
        assert torch.equal(exponential_noise([i], [i], 1234, "cpu")[0], batch[i, :1234])


@pytest.mark.parametrize(("seed", "index"), KEYS)
def test_uniform_over_token_ids(seed: int, index: int) -> None:
    assert looks_uniform(uniform([seed], [index], N))


@pytest.mark.parametrize("token_id", [0, 1, 255, 49_151])
def test_uniform_over_output_indices_and_over_consecutive_seeds(token_id: int) -> None:
    token_ids = torch.full((N, 1), token_id)
    by_index = torch.exp(-exponential_noise_for([11] * N, list(range(N)), token_ids).double())
    by_seed = torch.exp(-exponential_noise_for(list(range(N)), [5] * N, token_ids).double())
    assert looks_uniform(by_index)
    assert looks_uniform(by_seed)
    # ... and each value tells nothing about the next one
    assert looks_independent(by_index[:-1], by_index[1:])
    assert looks_independent(by_seed[:-1], by_seed[1:])


@pytest.mark.parametrize(("seed", "index"), KEYS)
def test_neighbouring_keys_and_neighbouring_tokens_are_independent(seed: int, index: int) -> None:
    here, next_seed, next_index = uniform([seed, seed + 1, seed], [index, index, index + 1], N)
    assert looks_independent(here, next_seed)
    assert looks_independent(here, next_index)
    assert looks_independent(next_seed, next_index)  # (s + 1, i) and (s, i + 1) have the same sum
    assert looks_independent(here[:-1], here[1:])


def test_the_exponential_distribution_in_its_smallest_values() -> None:
    """The race is decided there. P(q < x) = 1 - e^-x: of 2^24 values, about 2^24 * x are below a small x."""
    noise = exponential_noise(list(range(256)), [0] * 256, N, "cpu")
    for x in (1e-5, 1e-4, 1e-3):
        expected = noise.numel() * -math.expm1(-x)
        assert abs((noise < x).sum().item() - expected) < 4 * math.sqrt(expected)
    assert noise.double().mean().item() == pytest.approx(1.0, abs=4 / math.sqrt(noise.numel()))
    assert noise.double().var().item() == pytest.approx(1.0, abs=0.01)


def test_small_values_hardly_ever_tie() -> None:
    """With noise on a 2^-24 grid about 1 row in 700 of this vocabulary would have a tie for first place."""
    two_smallest = exponential_noise(list(range(500)), [1] * 500, 20_000, "cpu").topk(2, largest=False).values
    assert (two_smallest[:, 0] == two_smallest[:, 1]).sum().item() == 0


def test_one_changed_bit_of_the_key_changes_half_of_the_bits_of_a_token() -> None:
    def bits(seed: int, index: int) -> torch.Tensor:
        u = uniform([seed], [index], 4096)[0]
        return torch.stack([(u * 2.0**b).long() & 1 for b in range(1, 9)])  # the leading 8 bits of u

    for flip in range(0, 63, 7):
        assert (bits(0, 0) ^ bits(1 << flip, 0)).double().mean().item() == pytest.approx(0.5, abs=0.015)
    for flip in range(0, 20, 3):
        assert (bits(9, 0) ^ bits(9, 1 << flip)).double().mean().item() == pytest.approx(0.5, abs=0.015)


def test_keys_of_small_seeds_and_indices_are_all_different() -> None:
    keys = {random_key(seed, index) for seed in range(300) for index in range(300)}
    assert len(keys) == 300 * 300
    assert len({k & 0xFFFFFFFF for k in keys}) > 300 * 300 - 10  # about 0.94 collisions expected in 32 bits
