"""The algorithm: each step is the best answer to the last rounding, and all together beat rounding (milestone M7)."""

import itertools

import pytest
import torch

from folovllm.gptq_config import GPTQConfig
from folovllm.quantize.gptq import GPTQ, Hessian, output_error, rtn_quantize
from folovllm.quantize.grid import Grid

pytestmark = pytest.mark.m7

OUT = 12


def layer_inputs(size: int, seed: int, num_tokens: int = 400) -> torch.Tensor:
    """Correlated, of different strength, as activations are: [num_tokens, size]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(size) + torch.randn(size, size, generator=generator) / size**0.5
    strength = torch.rand(size, generator=generator) * 3 + 0.1
    return torch.randn(num_tokens, size, generator=generator) @ mixing * strength


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    hessian = Hessian(x.shape[1])
    for part in x.split(150):
        hessian.add(part)
    assert hessian.num_tokens == x.shape[0]
    return hessian.matrix


def weights(size: int, seed: int) -> torch.Tensor:
    return torch.randn(OUT, size, generator=torch.Generator().manual_seed(1000 + seed))


def least_squares_answer(weight: torch.Tensor, fixed: dict[int, torch.Tensor], hessian: torch.Tensor) -> torch.Tensor:
    """Weights nearest to the original in output, with the columns in `fixed` given: solved afresh, in fp64.

    Minimise tr((V - W) H (V - W)^T) over the free columns F: (V_F - W_F) H_FF = (W_K - V_K) H_KF.
    """
    weight, hessian = weight.double(), hessian.double()
    known = sorted(fixed)
    free = [i for i in range(weight.shape[1]) if i not in fixed]
    answer = weight.clone()
    answer[:, known] = torch.stack([fixed[i].double() for i in known], dim=1)
    moved = (weight[:, known] - answer[:, known]) @ hessian[known][:, free]
    answer[:, free] += torch.linalg.solve(hessian[free][:, free], moved, left=False)
    return answer


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_is_the_closed_form(size: int, seed: int) -> None:
    """OBQ's answer depends on nothing but what is fixed so far; GPTQ gets there step by step."""
    hessian, original = hessian_of(layer_inputs(size, seed)), weights(size, seed)
    gptq = GPTQ(GPTQConfig(3), damp=0.0)
    root, work, fixed = gptq.damped_root(hessian), original.clone(), {}
    grid = Grid.find(original, GPTQConfig(3))
    for column in range(size):
        fixed[column] = grid.values(grid.levels(work[:, column]))
        gptq.step(work, column, fixed[column], root)
        expected = least_squares_answer(original, fixed, hessian)
        torch.testing.assert_close(work.double(), expected, rtol=1e-4, atol=1e-4)


def test_two_by_two_by_hand() -> None:
    """H = [[2, 1], [1, 2]]: an error e in the first column is worth e * H_12 / H_22 = e / 2 in the second."""
    gptq = GPTQ(GPTQConfig(3), damp=0.0)
    root = gptq.damped_root(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    weight = torch.tensor([[0.3, 1.0]])
    gptq.step(weight, 0, torch.tensor([0.0]), root)
    torch.testing.assert_close(weight, torch.tensor([[0.0, 1.15]]))


def test_two_columns_are_rounded_as_well_as_possible() -> None:
    """The second column is the best answer to the first: no other level of it gives a smaller error."""
    config, hessian, weight = GPTQConfig(2), hessian_of(layer_inputs(2, 5)), weights(2, 5)
    done = GPTQ(config, damp=0.0).quantize(weight, hessian)
    best = output_error(weight, done.dequantize(), hessian)
    for row, level in itertools.product(range(OUT), range(4)):
        levels = done.levels.clone()
        levels[row, 1] = level
        other = type(done)(levels, done.scales, done.zeros, done.g_idx)
        assert output_error(weight, other.dequantize(), hessian) >= best - 1e-7


def errors_beside_rounding(config: GPTQConfig, seed: int, size: int = 96, static_groups: bool = False) -> float:
    """GPTQ's error as a share of rounding's."""
    hessian, weight = hessian_of(layer_inputs(size, seed)), weights(size, seed)
    done = GPTQ(config, static_groups=static_groups).quantize(weight, hessian)
    nearest = rtn_quantize(weight, config)
    return output_error(weight, done.dequantize(), hessian) / output_error(weight, nearest.dequantize(), hessian)


@pytest.mark.parametrize("seed", range(20))
def test_layer_error_below_rounding_to_nearest(seed: int) -> None:
    """All widths; 2 bits in small groups only with grids that do not grow (the next test says why)."""
    for bits in (2, 3, 4, 8):
        config = GPTQConfig(bits, (32, -1)[seed // 4 % 2], sym=seed % 3 > 0, desc_act=seed % 2 > 0)
        share = errors_beside_rounding(config, seed, static_groups=bits == 2)
        assert share < 0.8, f"{bits} bits"


def test_grids_grow_with_two_bits_unless_they_are_static() -> None:
    """Later groups have made up for the errors of earlier ones, and are wider: their grids get coarse."""
    config = GPTQConfig(2, 32)
    hessian, weight = hessian_of(layer_inputs(384, 0)), weights(384, 0)
    growing, static = (GPTQ(config, static_groups=s).quantize(weight, hessian) for s in (False, True))
    assert torch.equal(static.scales, rtn_quantize(weight, config).scales)
    growth = growing.scales.mean(1) / static.scales.mean(1)  # [num_groups]
    assert growth[0] == 1.0 and growth[-4:].mean() > 1.2
    assert errors_beside_rounding(config, 0, 384, static_groups=True) < 0.7
    assert errors_beside_rounding(config, 0, 384) > 0.9


def test_static_groups_are_of_neighbours_in_any_order() -> None:
    """Act-order then changes the order of the steps, not who shares a scale: nothing to permute at run time."""
    hessian, weight, config = hessian_of(layer_inputs(96, 4)), weights(96, 4), GPTQConfig(3, 32, desc_act=True)
    done = GPTQ(config, static_groups=True).quantize(weight, hessian)
    assert done.g_idx.tolist() == [0] * 32 + [1] * 32 + [2] * 32
    plain = GPTQ(GPTQConfig(3, 32), static_groups=True).quantize(weight, hessian)
    assert torch.equal(done.scales, plain.scales) and not torch.equal(done.levels, plain.levels)
    assert output_error(weight, done.dequantize(), hessian) < output_error(
        weight, rtn_quantize(weight, config).dequantize(), hessian
    )


@pytest.mark.parametrize("config", [GPTQConfig(4, 32), GPTQConfig(3, -1, sym=False), GPTQConfig(4, 32, desc_act=True)])
def test_blocks_change_nothing(config: GPTQConfig) -> None:
    """Lazy updates reorder additions only. 8 and 1 are raised to whole groups where there are groups."""
    hessian, weight = hessian_of(layer_inputs(96, 1)), weights(96, 1)
    results = [GPTQ(config, block_size=size).quantize(weight, hessian) for size in (96, 128, 8, 1)]
    for other in results[1:]:
        # A weight in the middle between two levels may go either way: next to none does.
        assert (other.levels != results[0].levels).float().mean() < 0.01
        torch.testing.assert_close(other.scales, results[0].scales, rtol=2e-3, atol=1e-6)


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    """H diagonal: no column can make up for another."""
    weight, hessian = weights(64, 3), torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5)
    config = GPTQConfig(4, 32)
    assert torch.equal(GPTQ(config).quantize(weight, hessian).levels, rtn_quantize(weight, config).levels)


def test_act_order_takes_the_strongest_inputs_first() -> None:
    strength = torch.linspace(0.1, 3.0, 64)  # the last input is the strongest
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * strength
    plain, ordered = (
        GPTQ(GPTQConfig(4, 32, desc_act=d)).quantize(weights(64, 0), hessian_of(x)) for d in (False, True)
    )
    assert plain.g_idx.tolist() == [0] * 32 + [1] * 32
    assert sorted(ordered.g_idx.tolist()) == plain.g_idx.tolist()
    assert ordered.g_idx[-20:].eq(0).all() and ordered.g_idx[:20].eq(1).all()


def test_ragged_last_group() -> None:
    """72 inputs in groups of 32: three groups, the last of 8, for both methods."""
    hessian, weight, config = hessian_of(layer_inputs(72, 2)), weights(72, 2), GPTQConfig(4, 32)
    for quantized in (GPTQ(config).quantize(weight, hessian), rtn_quantize(weight, config)):
        assert quantized.scales.shape == (3, OUT) and quantized.g_idx.tolist() == [0] * 32 + [1] * 32 + [2] * 8
        assert output_error(weight, quantized.dequantize(), hessian) < 0.01


def test_dead_inputs_and_too_few_tokens() -> None:
    """Inputs that are always zero get weight zero; a singular H is damped until it can be inverted."""
    x = layer_inputs(64, 0, num_tokens=10)
    x[:, 5] = 0.0
    weight = weights(64, 0)
    quantized = GPTQ(GPTQConfig(4, 32), damp=0.0).quantize(weight, hessian_of(x))
    assert quantized.dequantize().isfinite().all()
    assert quantized.dequantize()[:, 5].eq(0).all()
    assert output_error(weight, quantized.dequantize(), hessian_of(x)) < 0.1


def test_inputs_that_are_not_numbers_are_refused() -> None:
    hessian = torch.eye(8)
    hessian[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity: check the model and the calibration text"):
        GPTQ(GPTQConfig(4)).quantize(weights(8, 0), hessian)


# --- Grids ------------------------------------------------------------------------------------------------------------


def test_symmetric_grid() -> None:
    """The largest |weight| decides; zero is the middle level, so the grid has one step more below than above."""
    grid = Grid.find(torch.tensor([[-0.5, 0.25], [0.1, 0.75], [0.0, 0.0]]), GPTQConfig(4))
    assert grid.zero.tolist() == [8, 8, 8]
    torch.testing.assert_close(grid.scale[:2], torch.tensor([1 / 15, 1.5 / 15]), rtol=1e-3, atol=0)
    assert grid.levels(torch.tensor([-9.0, 9.0, 0.0])).tolist() == [0, 15, 8]
    assert grid.values(torch.tensor([8.0, 8.0, 8.0])).tolist() == [0, 0, 0]


def test_asymmetric_grid_reaches_both_ends() -> None:
    weight = torch.tensor([[-0.3, 0.9], [0.2, 0.6], [-0.8, -0.1]])
    grid = Grid.find(weight, GPTQConfig(2, sym=False, checkpoint_format="gptq_v2"))
    assert grid.zero.tolist() == [1, 0, 3]
    torch.testing.assert_close(grid.values(grid.levels(weight))[0], torch.tensor([-0.4, 0.8]), rtol=1e-3, atol=0)


def test_v1_has_no_zero_zero() -> None:
    """A group without negative weights gets zero 1 in v1, whose files could hold 0 only as -1."""
    assert Grid.find(torch.tensor([[0.2, 0.6]]), GPTQConfig(4, sym=False)).zero.tolist() == [1]


def test_scales_are_what_the_checkpoint_keeps() -> None:
    scale = Grid.find(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * 1e-3, GPTQConfig(3)).scale
    assert torch.equal(scale, scale.half().float()) and scale.min() > 0
