"""Checks of m4/online_softmax."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.backends.torch_flash import TorchFlashBackend
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import check_tokens, with_attributes
from folovllm.learn.exercise import get_exercise

INF = float("inf")


def prediction() -> str:
    tiles = [[2.0, 4.0], [7.0, 1.0], [5.0, 6.0]]
    values = [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]  # later tiles add nothing to O: what changes is the factor
    acc = [run(TorchFlashBackend, tiles[:n], values[:n]).acc.item() for n in (1, 2, 3)]
    return (
        f"{acc[1] / acc[0]:.3f}, {acc[2] / acc[1]:.3f}\nThe factor is exp(m - m'): exp(4 - 7), because 7 is a larger "
        "maximum, and then exp(7 - 7), because neither 5 nor 6 is."
    )


def backend(cls: Any) -> Any:
    return cls(AttentionSpec(1, 1, 1, torch.float32, torch.device("cpu"), block_size=1))


def run(cls: Any, scores: Sequence[Sequence[float]], values: Sequence[Sequence[float]]) -> Any:
    """The state of a single query of head size 1 after these tiles."""
    mine = backend(cls)
    state = mine.start_softmax(torch.zeros(1, 1, 1))
    for tile, value in zip(scores, values, strict=True):
        state = mine.update_softmax(state, torch.tensor(tile).view(1, 1, -1), torch.tensor(value).view(1, -1, 1))
    return state


def attend(cls: Any, scores: Sequence[Sequence[float]], values: Sequence[Sequence[float]]) -> tuple[float, float]:
    out, lse = backend(cls).finish_softmax(run(cls, scores, values))
    return out.item(), lse.item()


def near(a: float, b: float) -> bool:
    return a == b or abs(a - b) <= 1e-4 * max(1.0, abs(b))


@check("unit", spec="R4.14", hint=2)
def one_tile_is_softmax(mine: Mine) -> None:
    """With all keys in one tile, the result is softmax as the formula says it."""
    out, lse = attend(mine.cls, [[1.0, 3.0]], [[10.0, 20.0]])
    weights = torch.softmax(torch.tensor([1.0, 3.0]), 0)
    wanted = float(weights @ torch.tensor([10.0, 20.0]))
    assert near(out, wanted), (
        f"scores 1 and 3 with values 10 and 20 gave {out:.4f}, expected {wanted:.4f}: out is O / l"
    )
    wanted = math.log(math.exp(1.0) + math.exp(3.0))
    assert near(lse, wanted), f"their lse is {lse:.4f}, expected log(e^1 + e^3) = {wanted:.4f}: lse is m + log(l)"


@check("unit", spec="R4.14", hint=2)
def every_row_has_its_own_numbers(mine: Mine) -> None:
    """A tile holds many queries: every row of every KV head has a maximum and sums of its own."""
    softmax, scores = backend(mine.cls), torch.tensor([[[1.0, 3.0], [0.0, 9.0], [4.0, 4.0]], [[5.0, 2.0]] * 3])
    value = torch.tensor([[[10.0] * 4, [20.0] * 4], [[1.0] * 4, [2.0] * 4]])  # [2 KV heads, 2 keys, head size 4]
    shapes = [list(tensor.shape) for tensor in softmax.start_softmax(torch.zeros(2, 3, 4))]
    wanted = [[2, 3, 1], [2, 3, 1], [2, 3, 4]]
    assert shapes == wanted, (
        f"for q [2, 3, 4] start_softmax returned row_max, row_sum and acc of the shapes {shapes}, expected {wanted}"
    )
    state = softmax.update_softmax(softmax.start_softmax(torch.zeros(2, 3, 4)), scores.clone(), value)
    shapes = [list(tensor.shape) for tensor in state]
    assert shapes == wanted, (
        f"for scores [2, 3, 2] update_softmax returned row_max, row_sum and acc of the shapes {shapes}, expected "
        f"{wanted}: a reduction over the keys drops a dimension unless it has keepdim=True, and broadcasting then "
        "mixes rows"
    )
    out, lse = softmax.finish_softmax(state)
    assert list(out.shape) == [2, 3, 4] and list(lse.shape) == [2, 3], (
        f"finish_softmax returned out {list(out.shape)} and lse {list(lse.shape)}, expected [2, 3, 4] and [2, 3]"
    )
    exact = scores.softmax(-1) @ value
    error = (out - exact).abs().max().item()
    assert error < 1e-4, f"two KV heads of three rows: out is {error:.3g} away from softmax(scores) @ value, expected 0"


@check("unit", spec="R4.14", hint=1)
def a_larger_score_corrects_what_was_summed(mine: Mine) -> None:
    """If a tile brings a larger maximum, the sums that carry the old one are corrected by exp(m - m')."""
    state = run(mine.cls, [[1.0, 3.0], [5.0]], [[10.0, 20.0], [30.0]])
    found = tuple(round(tensor.item(), 3) for tensor in state)
    assert found == (5.0, 1.154, 32.890), (
        f"after scores [1, 3] and then [5] the state is (m, l, O) = {found}, expected (5.0, 1.154, 32.89): the terms "
        "of the first tile carry exp(-3) and must carry exp(-5) now"
    )


@check("unit", spec="R4.14", hint=1)
def a_smaller_score_changes_no_maximum(mine: Mine) -> None:
    """If a tile brings no larger score, the maximum stays and the tile's terms are taken relative to it."""
    out, _ = attend(mine.cls, [[5.0], [3.0, 1.0]], [[30.0], [20.0, 10.0]])
    other, _ = attend(mine.cls, [[3.0, 1.0], [5.0]], [[20.0, 10.0], [30.0]])
    assert near(out, other), (
        f"the tiles [5], [3, 1] gave {out:.4f}, and [3, 1], [5] gave {other:.4f}: order is no matter"
    )


@check("unit", spec="R4.3", hint=2)
def extreme_scores_do_not_overflow(mine: Mine) -> None:
    """exp of a score of 1,000 is infinite in fp32, so only differences to the maximum may be exponentiated."""
    for large in (1e3, 1e4, -1e4):
        out, lse = attend(mine.cls, [[large, large - 1.0], [large + 1.0]], [[1.0, 2.0], [4.0]])
        weights = torch.softmax(torch.tensor([0.0, -1.0, 1.0]), 0)
        wanted = float(weights @ torch.tensor([1.0, 2.0, 4.0]))
        assert near(out, wanted), f"scores around {large:.0f} gave {out}, expected {wanted:.4f}: only differences count"
        assert abs(lse - large) < 2, f"scores around {large:.0f} have an lse of {lse}, expected about {large + 1.4:.1f}"


@check("unit", spec="R4.14", hint=3)
def a_masked_tile_changes_nothing(mine: Mine) -> None:
    """A row may see nothing of a tile, first or later: all of its scores there are -inf."""
    wanted, _ = attend(mine.cls, [[2.0, 1.0]], [[3.0, 4.0]])
    for scores in ([[-INF, -INF], [2.0, 1.0]], [[2.0, 1.0], [-INF, -INF]], [[-INF], [2.0, 1.0], [-INF]]):
        values = [[3.0, 4.0] if tile == [2.0, 1.0] else [9.0] * len(tile) for tile in scores]
        out, _ = attend(mine.cls, scores, values)
        assert near(out, wanted), (
            f"the tiles {scores} gave {out}, expected {wanted:.4f}, as if they were not there: exp(-inf - -inf) is NaN"
        )


@check("unit", spec="R4.14", hint=3)
def a_row_that_sees_nothing_is_zero(mine: Mine) -> None:
    """A query without a single visible key gets out 0 and lse -inf, so that it has no weight when parts are merged."""
    for scores in ([], [[-INF, -INF]], [[-INF], [-INF]]):
        out, lse = attend(mine.cls, scores, [[7.0] * len(tile) for tile in scores])
        assert (out, lse) == (0.0, -INF), f"the tiles {scores} gave out {out} and lse {lse}, expected 0 and -inf"


@check("property", spec="R4.12", hint=2)
def any_cut_into_tiles_gives_the_same_answer(mine: Mine) -> None:
    """However the keys are cut into tiles, the result is softmax over all of them, row by row."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        num_keys, rows = 1 + seed, 1 + seed % 3
        scores = torch.randn(2, rows, num_keys, generator=generator) * (1 + seed)  # [kv_heads, rows, keys]
        scores[torch.rand(scores.shape, generator=generator) < 0.3] = -INF
        value = torch.randn(2, num_keys, 4, generator=generator)  # [kv_heads, keys, head_size]
        sizes, left = [], num_keys
        while left:
            sizes.append(int(torch.randint(1, left + 1, (1,), generator=generator)))
            left -= sizes[-1]
        softmax = backend(mine.cls)
        state = softmax.start_softmax(torch.zeros(2, rows, 4))
        for tile, values in zip(scores.split(sizes, 2), value.split(sizes, 1), strict=True):
            state = softmax.update_softmax(state, tile.clone(), values)
        out, lse = softmax.finish_softmax(state)
        wanted = torch.softmax(scores.double(), 2).nan_to_num() @ value.double()
        error = (out.double() - wanted).abs().max().item()
        assert error < 1e-4, (
            f"{num_keys} keys in tiles of {sizes}: the largest difference to softmax over all keys is {error}, "
            "expected less than 1e-4"
        )
        exact = torch.logsumexp(scores.double(), 2)
        assert torch.allclose(lse.double(), exact, rtol=1e-4, atol=1e-4), (
            f"{num_keys} keys in tiles of {sizes}: lse is {lse.tolist()}, expected {exact.tolist()}, the log of the "
            "sum of exp(score) over all keys"
        )


@check("engine", spec="R4.12", hint=3)
def same_tokens_in_small_tiles(mine: Mine) -> None:
    """A real engine, with tiles of 4 queries and 8 keys, generates the tokens of its own softmax."""
    with with_attributes(mine.parts, BLOCK_Q=4, BLOCK_KV=8) as parts:
        check_tokens(get_exercise("m4", "online_softmax"), parts)
