"""The checks of m1/seeded_noise: what the noise depends on, the race by hand, 10,000 draws, and a real engine.

The limits of the statistical checks are those that a right solution exceeds once in a million seeds.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import tiny_model
from folovllm.sample.sampler import Sampler
from folovllm.sampling_params import SamplingParams

DRAWS = 10_000
PROBS = [0.5, 0.3, 0.2, 0.0]


def noise(mine: Mine, seeds: Sequence[int], indices: Sequence[int], vocab_size: int = 8) -> torch.Tensor:
    return mine.cls.exponential_noise(list(seeds), list(indices), vocab_size, "cpu")


def with_noise(cls: Any, values: list[list[float]]) -> Any:
    """A sampler of the class whose noise is given, so that the race alone is looked at."""

    class Fixed(cls):  # type: ignore[misc, valid-type]
        @staticmethod
        def exponential_noise(*_: Any) -> torch.Tensor:
            return torch.tensor(values)

    return Fixed()


def prediction() -> str:
    probs, values = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.0, 0.2]]), [[1.0, 0.3, 0.5]] * 2
    first, second = with_noise(Sampler, values).random_sample(probs, [0, 0], [0, 0]).tolist()
    return f"tokens {first} and {second}\nThe clocks ring at 2.0, 1.0 and 2.5; the one in the middle is masked then."


@check("unit", spec="R1.26", hint=1)
def the_noise_has_its_shape(mine: Mine) -> None:
    """One row per request, one number per token, and no number that would break the division."""
    got = noise(mine, [3, 4, 5], [0, 0, 7], vocab_size=1000)
    assert got.shape == (3, 1000) and got.dtype == torch.float32, (
        f"3 rows and a vocabulary of 1,000 gave {got.dtype} {list(got.shape)}, expected torch.float32 [3, 1000]"
    )
    assert bool((got > 0).all()) and bool(got.isfinite().all()), (
        f"the noise lies between {float(got.min())} and {float(got.max())}: it must be finite and > 0"
    )


@check("unit", spec="R1.26", hint=1)
def a_row_is_the_same_in_every_batch(mine: Mine) -> None:
    """The noise of a request does not depend on the requests beside it, or on their order."""
    seeds, indices = [7, 42, 9], [0, 3, 5]
    together, alone = noise(mine, seeds, indices), noise(mine, [42], [3])
    assert torch.equal(together[1], alone[0]), (
        f"seed 42, index 3 has the noise {some(alone[0])} alone and {some(together[1])} between two other rows: its "
        "user would get another text whenever the server is busy"
    )


@check("unit", spec="R1.26", hint=1)
def the_same_key_gives_the_same_noise_again(mine: Mine) -> None:
    """A draw that is repeated (after a failed step, or in a replay) gets the same noise, whatever came between."""
    first = noise(mine, [42], [3])
    for other in range(4):
        noise(mine, [42], [other])
    second = noise(mine, [42], [3])
    assert torch.equal(first, second), (
        f"seed 42, index 3 had the noise {some(first[0])} and then {some(second[0])}: a generator has kept its state"
    )


@check("unit", spec="R1.47", hint=1)
def the_global_generator_is_not_touched(mine: Mine) -> None:
    """The noise neither reads torch's global generator nor moves it: it belongs to the user's program."""
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), noise(mine, [42], [3])
    moved = not torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = noise(mine, [42], [3])
    assert torch.equal(first, second), "the noise of seed 42, index 3 changes with torch.manual_seed: it has no seed"
    assert not moved, "the call moved torch's global generator: the user's own random numbers change with the traffic"


@check("unit", spec="R1.26", hint=3)
def neighbours_are_not_related(mine: Mine) -> None:
    """Another index or another seed is other noise, and seed + 1 is not the same text shifted by one."""
    rows = {(seed, index): noise(mine, [seed], [index])[0] for seed in (5, 6, 7) for index in (0, 1, 2)}
    seen: dict[tuple[float, ...], tuple[int, int]] = {}
    for key, row in rows.items():
        values = tuple(row.tolist())
        assert values not in seen, (
            f"(seed, index) {seen[values]} and {key} have the same noise. Completions of one request with n = 3 have "
            "the seeds s, s + 1, s + 2, and would repeat each other's draws"
        )
        seen[values] = key
    for one, other in (((1, 23), (12, 3)), ((1, 10), (11, 0)), ((2, 1), (1, 2))):
        assert not torch.equal(noise(mine, [one[0]], [one[1]]), noise(mine, [other[0]], [other[1]])), (
            f"(seed, index) {one} and {other} have the same noise: the two numbers must be told apart before they are "
            "mixed, e.g. by a comma between them"
        )


@check("unit", spec="R1.26", hint=3)
def every_integer_is_a_seed(mine: Mine) -> None:
    """A user may give any 64-bit integer of either sign as a seed, and n = 3 counts up from it."""
    seeds = [0, 3, 3 + 2**32, -2, 2**63 - 1, -(2**63), 2**64 - 1]
    try:
        got = noise(mine, seeds, [0] * len(seeds))
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:
        raise AssertionError(f"the seeds {seeds} raised {type(error).__name__}: {error}") from error
    for i, j in itertools.combinations(range(5), 2):
        assert not torch.equal(got[i], got[j]), (
            f"the seeds {seeds[i]} and {seeds[j]} have the same noise: some bits of a seed have no influence on it"
        )


@check("unit", spec="R1.20", hint=2)
def the_first_clock_wins(mine: Mine) -> None:
    """The token whose clock rings first (noise / probability) is drawn; a token of probability 0 never is."""
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.0, 0.2], [0.0, 0.0, 1.0]])  # [3, 3]
    sampler = with_noise(mine.cls, [[1.0, 0.3, 0.5], [1.0, 0.3, 0.1], [0.1, 0.1, 90.0]])
    got = sampler.random_sample(probs, [0, 1, 2], [0, 0, 0])
    assert got.shape == (3,) and got.dtype == torch.int64, (
        f"3 rows gave {got.dtype} {list(got.shape)}, expected int64 [3]"
    )
    assert got.tolist() == [1, 2, 2], (
        f"the race drew {got.tolist()}, expected [1, 2, 2]: the clocks of row 0 ring at 1/0.5 = 2.0, 0.3/0.3 = 1.0 and "
        "0.5/0.2 = 2.5, and a token of probability 0 has a clock that never rings"
    )


@check("property", spec="R1.26", hint=2)
def the_noise_is_exponential(mine: Mine) -> None:
    """The noise has the exponential distribution, along token ids, indices and seeds."""
    samples = {
        "one row over 10,000 token ids": noise(mine, [1], [0], DRAWS)[0],
        "token 5 of one seed at 10,000 indices": noise(mine, [1] * DRAWS, range(DRAWS))[:, 5],
        "token 5 of 10,000 seeds at one index": noise(mine, range(DRAWS), [3] * DRAWS)[:, 5],
    }
    for name, values in samples.items():
        cells = torch.floor(10 * (1 - torch.exp(-values.double()))).clamp(0, 9)  # [10,000], ten equally likely cells
        counts = torch.bincount(cells.long(), minlength=10).tolist()
        chi_square = sum((count - DRAWS / 10) ** 2 / (DRAWS / 10) for count in counts)
        assert chi_square < 45.1, (  # 9 degrees of freedom
            f"{name}: the ten cells that hold 1,000 of 10,000 exponential numbers each hold {counts} "
            f"(chi-square {chi_square:.0f}, at most 45)"
        )


@check("property", spec="R1.20", hint=2)
def ten_thousand_draws_follow_the_distribution(mine: Mine) -> None:
    """Tokens are drawn as often as their probabilities say, and a draw tells nothing about the next one."""
    probs = torch.tensor([PROBS]).repeat(DRAWS, 1)  # [10,000, 4]
    keys = {
        "one request of 10,000 tokens": ([11] * DRAWS, list(range(DRAWS))),
        "the first tokens of 10,000 requests": (list(range(DRAWS)), [0] * DRAWS),
    }
    for name, (seeds, indices) in keys.items():
        drawn = mine.cls().random_sample(probs, seeds, indices)
        counts = torch.bincount(drawn, minlength=4).tolist()
        expected = [DRAWS * p for p in PROBS]
        assert counts[3] == 0, f"{name}: a token of probability 0 was drawn {counts[3]} times"
        chi_square = sum((a - b) ** 2 / b for a, b in zip(counts, expected, strict=True) if b)
        assert chi_square < 27.7, (  # 2 degrees of freedom
            f"{name} have the counts {counts}, expected about {[round(e) for e in expected]} "
            f"(chi-square {chi_square:.0f}, at most 27)"
        )
        pairs = torch.bincount(4 * drawn[:-1] + drawn[1:], minlength=16).tolist()
        share = [(DRAWS - 1) * a * b for a in PROBS for b in PROBS]
        chi_square = sum((a - b) ** 2 / b for a, b in zip(pairs, share, strict=True) if b)
        assert chi_square < 42.8, (  # 8 degrees of freedom
            f"{name}: neighbouring draws depend on each other (chi-square of the pairs {chi_square:.0f}, at most 42)"
        )


@check("engine", spec="R1.47", hint=1)
def batch_mates_do_not_change_a_text(mine: Mine) -> None:
    """In a real engine, seeded requests draw the same tokens alone and together; without a seed, they differ."""
    seeds = [1, 2, 3, 2**63 - 1]
    together, alone = tokens_of_engine(mine, seeds, max_num_seqs=4), tokens_of_engine(mine, seeds, max_num_seqs=1)
    for seed, a, b in zip(seeds, alone, together, strict=True):
        assert a == b, f"seed {seed} drew {a} alone and {b} in a batch of four: its noise depends on the other requests"
    assert len({tuple(tokens) for tokens in together}) == len(seeds), f"four seeds drew only {together}"


def tokens_of_engine(mine: Mine, seeds: list[int], max_num_seqs: int) -> list[list[int]]:
    from folovllm.entrypoints.llm import LLM

    llm = LLM(tiny_model(), preset="m2", dtype="float32", device="cpu", max_model_len=32, max_num_seqs=max_num_seqs,
              parts=mine.parts, skip_tokenizer_init=True)  # fmt: skip
    params = [SamplingParams(seed=seed, max_tokens=12, ignore_eos=True, temperature=1.0) for seed in seeds]
    outputs = llm.generate([{"prompt_token_ids": [5, 6, 7]}] * len(seeds), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def some(row: torch.Tensor) -> str:
    return f"[{', '.join(f'{x:.3f}' for x in row[:3].tolist())}, ...]"
