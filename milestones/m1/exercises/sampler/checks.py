"""The checks of m1/sampler: numbers worked by hand, independence of the rows, 2,000 draws, and a real engine."""

import math
from typing import Any

import torch

from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import tiny_model
from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.sampler import Sampler
from folovllm.sampling_params import SamplingParams

PROBS = [0.05, 0.5, 0.15, 0.3]  # not in order, as in life
INF = math.inf


def log(probs: list[float]) -> torch.Tensor:
    return torch.tensor([probs]).log()  # [1, V], logits whose softmax is `probs`


def kept(logits: torch.Tensor) -> list[int]:
    return (logits[0] > -INF).nonzero().squeeze(1).tolist()


def top_p(cls: Any, probs: list[float], p: float) -> list[int]:
    """The ids that `apply_top_p_` keeps of a row."""
    logits = log(probs)
    cls.apply_top_p_(logits, torch.tensor([p]))
    return kept(logits)


def top_k(cls: Any, logits: list[float], k: int) -> list[float]:
    rows = torch.tensor([logits])  # [1, V]
    cls.apply_top_k_(rows, torch.tensor([k]), min(k, len(logits)))
    return rows[0].tolist()


def prediction() -> str:
    alone = [len(top_p(Sampler, PROBS, p)) for p in (0.7, 0.85)]
    logits = log(PROBS)
    Sampler.apply_top_k_(logits, torch.tensor([2]), 2)
    Sampler.apply_top_p_(logits, torch.tensor([0.7]))
    return (
        f"{alone[0]}, {alone[1]} and {len(kept(logits))}\nAfter top_k = 2 the 0.5 and 0.3 have become 0.625 and 0.375."
    )


@check("unit", spec="R1.18", hint=3)
def logits_are_edited_in_place(mine: Mine) -> None:
    """The sampler goes on with the tensor that it handed over; what a method returns is not looked at."""
    steps = {
        "apply_temperature_": lambda x: mine.cls.apply_temperature_(x, torch.tensor([0.5])),
        "apply_top_k_": lambda x: mine.cls.apply_top_k_(x, torch.tensor([1]), 1),
        "apply_top_p_": lambda x: mine.cls.apply_top_p_(x, torch.tensor([0.4])),
    }
    for name, step in steps.items():
        logits = log(PROBS)
        step(logits)
        assert not torch.equal(logits, log(PROBS)), f"{name} left the logits as they were: it must change them in place"


@check("unit", spec="R1.27", hint=1)
def temperature_divides_each_row(mine: Mine) -> None:
    """A temperature below 1 makes differences larger; each row has its own, and a greedy row (0) stays as it is."""
    logits = torch.tensor([[2.0, -1.0]] * 3)  # [3, 2]
    mine.cls.apply_temperature_(logits, torch.tensor([0.5, 4.0, 0.0]))
    expected = [[4.0, -2.0], [0.5, -0.25], [2.0, -1.0]]
    assert logits.tolist() == expected, (
        f"temperatures 0.5, 4 and 0 on rows [2, -1] gave {logits.tolist()}, expected {expected}. A row of temperature "
        "0 is greedy, and another row of the batch draws: dividing it by 0 gives inf and nan"
    )


@check("unit", spec="R1.27", hint=3)
def top_k_keeps_ties(mine: Mine) -> None:
    """Everything below the k-th largest goes, and everything that equals it stays."""
    got = top_k(mine.cls, [1.0, 3.0, 4.0, 3.0], 2)
    assert got == [-INF, 3.0, 4.0, 3.0], (
        f"top_k=2 of [1, 3, 4, 3] gave {got}, expected [-inf, 3, 4, 3]: the second largest is 3, twice. Which of two "
        "equals stays must not depend on the order in which a kernel looks at them"
    )
    got = top_k(mine.cls, [1.0, 3.0, 4.0, 2.0], 1)
    assert got == [-INF, -INF, 4.0, -INF], f"top_k=1 of [1, 3, 4, 2] gave {got}, expected only 4 to stay"


@check("unit", spec="R1.21", hint=3)
def a_step_that_is_off_changes_no_bit(mine: Mine) -> None:
    """In a batch where one row truncates, the other rows pass through unchanged."""
    logits = torch.tensor([[1.0, 3.0, 4.0, 2.0]] * 2)  # [2, 4]
    mine.cls.apply_top_k_(logits, torch.tensor([4, 2]), 2)  # row 0: k is the vocabulary size
    assert logits[0].tolist() == [1.0, 3.0, 4.0, 2.0], f"top_k=V (off) changed the row to {logits[0].tolist()}"
    assert logits[1].tolist() == [-INF, 3.0, 4.0, -INF], f"top_k=2 beside a row that is off gave {logits[1].tolist()}"
    for row in ([1.0, -200.0, 4.0, 2.0], [0.0, -200.0, 0.0, 0.0]):  # in float32 the probability of token 1 is 0
        logits = torch.tensor([row] * 2)  # [2, 4]
        mine.cls.apply_top_p_(logits, torch.tensor([1.0, 0.5]))
        assert logits[0].tolist() == row, (
            f"top_p=1 (off) changed the row {row} to {logits[0].tolist()}: a cumulative sum in float32 cannot tell "
            "that nothing is to be removed"
        )
    rows = 8 * torch.randn(16, 300, generator=torch.Generator().manual_seed(0))  # [16, 300]
    logits = rows.clone()  # [16, 300]
    mine.cls.apply_top_p_(logits, torch.tensor([1.0, 0.5]).repeat(8))
    lost = int((logits[::2] != rows[::2]).sum())
    assert lost == 0, (
        f"top_p=1 (off) changed {lost} logits of 8 rows of 300: the cumulative sum of the likeliest may reach 1, or "
        "pass it, before the last token"
    )


@check("unit", spec="R1.24", hint=1)
def top_p_keeps_the_token_that_crosses_p(mine: Mine) -> None:
    """The kept tokens reach p, so the token whose probability crosses p is one of them."""
    for p, expected in ((0.7, [1, 3]), (0.85, [1, 2, 3]), (0.4, [1]), (0.99, [0, 1, 2, 3])):
        got = top_p(mine.cls, PROBS, p)
        mass = sum(PROBS[i] for i in got)
        assert got == expected, (
            f"top_p={p} of the probabilities {PROBS} kept the tokens {got} (together {mass:.2f}), expected {expected}: "
            "the fewest that reach p"
        )


@check("unit", spec="R1.24", hint=3)
def top_p_always_keeps_the_likeliest(mine: Mine) -> None:
    """A row must keep a token however small p is; 1 - p may round to 1."""
    for p in (0.1, 1e-9):
        got = top_p(mine.cls, PROBS, p)
        assert got == [1], f"top_p={p} of {PROBS} kept the tokens {got}, expected [1]: an empty row becomes NaN"


@check("unit", spec="R1.24", hint=2)
def top_p_keeps_as_many_equals_as_it_needs(mine: Mine) -> None:
    """Of equally likely tokens only as many stay as are needed to reach p."""
    got = top_p(mine.cls, [0.2] * 5, 0.5)
    assert len(got) == 3, (
        f"top_p=0.5 of five tokens of probability 0.2 kept {len(got)} of them, expected 3: two hold 0.4, three hold 0.6"
    )


@check("property", spec="R1.21", hint=3)
def a_row_does_not_depend_on_its_batch(mine: Mine) -> None:
    """What a request gets is the same alone and beside any other requests, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    for num_rows in (2, 3, 5, 8, 13):
        logits = 3 * torch.randn(num_rows, 50, generator=generator)  # [R, 50]
        temperature = 0.2 + torch.rand(num_rows, generator=generator)  # [R]
        k = torch.randint(1, 51, (num_rows,), generator=generator)  # [R]
        p = 0.05 + 0.95 * torch.rand(num_rows, generator=generator)  # [R]
        together = truncate(mine.cls, logits.clone(), temperature, k, p)
        for row in range(num_rows):
            one = slice(row, row + 1)
            alone = truncate(mine.cls, logits[one].clone(), temperature[one], k[one], p[one])
            assert torch.equal(alone[0], together[row]), (
                f"row {row} of {num_rows} (temperature {temperature[row]:.2f}, top_k {k[row]}, top_p {p[row]:.2f})"
                f" keeps {int((together[row] > -INF).sum())} tokens in the batch and {int((alone > -INF).sum())} alone"
            )


def truncate(cls: Any, logits: torch.Tensor, temperature: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> Any:
    cls.apply_temperature_(logits, temperature)
    on = k[k < logits.shape[1]]
    cls.apply_top_k_(logits, k, int(on.max()) if len(on) else 0) if len(on) else None
    cls.apply_top_p_(logits, p)
    return logits


@check("property", spec="R1.20", hint=2)
def the_draws_follow_the_distribution(mine: Mine) -> None:
    """The whole sampler, drawing with your steps, gives every token its share."""
    logits = [1.0, 2.0, 0.0, 1.5, -1.0, 0.5]
    params = SamplingParams(temperature=0.8, top_k=4, top_p=0.9)
    # e^(l / 0.8) of the four likeliest: 12.18, 6.52, 3.49, 1.87. top_p drops the last one, which holds 0.078 <= 0.1.
    weights = {1: math.exp(2.0 / 0.8), 3: math.exp(1.5 / 0.8), 0: math.exp(1.0 / 0.8)}
    draws = 2_000  # a solution that loops over the rows must be done in a few seconds
    rows = [SamplingRow(params, [], [0] * (i % 100), None, i // 100, []) for i in range(draws)]
    metadata = SamplingMetadata.build(rows, len(logits), "cpu")
    drawn = mine.cls()(torch.tensor([logits]).repeat(draws, 1), metadata).sampled_token_ids
    expected = {token: draws * weight / sum(weights.values()) for token, weight in weights.items()}
    counts = {token: drawn.count(token) for token in range(len(logits))}
    foreign = sum(count for token, count in counts.items() if token not in expected)
    assert foreign == 0, f"{foreign} of {draws:,} draws are tokens that top_k=4 and top_p=0.9 remove: {counts}"
    chi_square = sum((counts[token] - share) ** 2 / share for token, share in expected.items())
    # 2 degrees of freedom: a right sampler exceeds 13.8 once in 1,000 seeds, and not with these.
    assert chi_square < 13.8, (
        f"{draws:,} draws gave {counts}, expected about { {t: round(s) for t, s in expected.items()} } "
        f"(chi-square {chi_square:.1f}, at most 13.8)"
    )


@check("engine", spec="R1.18", hint=3)
def a_real_engine_draws_the_same_tokens(mine: Mine) -> None:
    """A real engine (a tiny model of random weights) draws the tokens that it draws with its own sampler."""
    settings = {
        "greedy": {"temperature": 0.0},
        "temperature 0.7": {"temperature": 0.7},
        "top_k 5": {"top_k": 5},
        "top_p 0.8": {"top_p": 0.8},
        "all three": {"temperature": 0.9, "top_k": 20, "top_p": 0.6},
    }
    expected, got = tokens_of_engine(None, settings), tokens_of_engine(mine.parts, settings)
    for name, a, b in zip(settings, expected, got, strict=True):
        assert a == b, f"with {name} the engine drew {b} with your sampler, and {a} with its own, of the same seed"


def tokens_of_engine(parts: Any, settings: dict[str, dict[str, float]]) -> list[list[int]]:
    from folovllm.entrypoints.llm import LLM

    llm = LLM(tiny_model(), preset="m1", dtype="float32", device="cpu", max_model_len=32, parts=parts,
              num_kv_blocks=3, skip_tokenizer_init=True)  # fmt: skip
    params = [SamplingParams(seed=7, max_tokens=12, ignore_eos=True, **values) for values in settings.values()]  # type: ignore[arg-type]
    outputs = llm.generate([{"prompt_token_ids": [5, 6, 7]}] * len(params), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
