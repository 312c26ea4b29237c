"""Checks of m7/rtn."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from folovllm.gptq_config import GPTQConfig
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import tiny_model
from folovllm.quantize.grid import Grid
from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint

WEIGHTS = [-0.3, 0.1, 0.9]


def prediction() -> str:
    weights = torch.tensor([[-0.3, -0.6, -0.9]])
    grid = Grid.find(weights, asym(2))
    levels = ", ".join(f"{level:.0f}" for level in grid.levels(weights)[0])
    return (
        f"{grid.scale.item():.2f}, {grid.zero.item():.0f}, {levels}\nThe grid reaches from -0.9 to 0, which every grid "
        "must reach, in 3 steps; the zero point is the level of 0."
    )


def asym(bits: int) -> GPTQConfig:
    return GPTQConfig(bits, sym=False, checkpoint_format="gptq_v2")


def found(cls: Any, weights: list[float], config: GPTQConfig) -> Any:
    """The grid of one output with these weights."""
    grid = cls.find(torch.tensor([weights]), config)
    for name in ("scale", "zero"):
        field = getattr(grid, name, None)
        kind = f"{field.dtype} {list(field.shape)}" if isinstance(field, torch.Tensor) else f"{field!r}"
        assert kind == "torch.float32 [1]", f"the grid of one output has the {name} {kind}, expected torch.float32 [1]"
    return grid


@check("unit", spec="R7.6", hint=2)
def an_asymmetric_grid_by_hand(mine: Mine) -> None:
    """2 bits, weights -0.3 to 0.9: three steps of 0.4, and the level that stands for 0 is 1."""
    grid = found(mine.cls, WEIGHTS, asym(2))
    case = f"the asymmetric grid of {WEIGHTS} with 2 bits"
    assert grid.max_level == 3, f"{case} has max_level {grid.max_level}, expected 3"
    assert abs(grid.scale.item() - 0.4) < 1e-3, f"{case} has the scale {grid.scale.item():.4f}, expected 1.2 / 3 = 0.4"
    assert grid.zero.item() == 1, f"{case} has the zero {grid.zero.item()}, expected round(0.3 / 0.4) = 1"
    levels = grid.levels(torch.tensor([WEIGHTS])).tolist()[0]
    assert levels == [0, 1, 3], f"{case} gives the levels {levels}, expected the nearest, [0, 1, 3]"
    values = [round(value, 2) for value in grid.values(torch.tensor([[0.0, 1.0, 3.0]])).tolist()[0]]
    assert values == [-0.4, 0.0, 0.8], f"{case}: levels 0, 1, 3 stand for {values}, expected [-0.4, 0.0, 0.8]"


@check("unit", spec="R7.6", hint=2)
def a_symmetric_grid_by_hand(mine: Mine) -> None:
    """4 bits: the zero is 8 everywhere, and 15 steps reach from minus the largest |weight| to plus it."""
    grid = found(mine.cls, [0.3, -1.5, 0.2], GPTQConfig(4))
    assert grid.zero.item() == 8, f"the zero of a symmetric 4-bit grid is {grid.zero.item()}, expected 2**3 = 8"
    assert abs(grid.scale.item() - 0.2) < 1e-3, (
        f"the largest |weight| is 1.5 and the scale {grid.scale.item():.4f}, expected 3.0 / 15 = 0.2"
    )


@check("unit", spec="R7.6", hint=1)
def the_grid_covers_its_weights_and_zero(mine: Mine) -> None:
    """If all weights have one sign, the grid still reaches to 0: a weight of 0 must stay exactly 0."""
    for weights in ([0.5, 0.7, 0.9], [-0.9, -0.2], [-0.3, 0.9]):
        for config in (asym(4), GPTQConfig(4)):
            grid = found(mine.cls, weights, config)
            case = f"in the {'symmetric' if config.sym else 'asymmetric'} 4-bit grid of {weights}"
            back = grid.values(grid.levels(torch.tensor([[*weights, 0.0]])))[0].tolist()
            assert back[-1] == 0.0, f"{case} a weight of 0 becomes {back[-1]}"
            step = grid.scale.item()
            for weight, value in zip(weights, back, strict=False):
                assert abs(value - weight) < 0.51 * step, (
                    f"{case} the weight {weight} becomes {value:.3f}, with a scale of {step:.3f}: it is out of reach"
                )


@check("unit", spec="R7.6", hint=3)
def the_zero_point_can_be_stored(mine: Mine) -> None:
    """A v1 file stores zero - 1, so a zero point of 0 has no place there. Without negative weights it is 1."""
    grid = found(mine.cls, [0.2, 0.6], GPTQConfig(4, sym=False))
    assert grid.zero.item() == 1, f"weights 0.2 and 0.6 in a v1 file have the zero {grid.zero.item()}, expected 1"
    grid = found(mine.cls, [0.2, 0.6], asym(4))
    assert grid.zero.item() == 0, f"weights 0.2 and 0.6 in a v2 file have the zero {grid.zero.item()}, expected 0"


@check("unit", spec="R7.6", hint=3)
def the_scale_is_what_the_file_keeps(mine: Mine) -> None:
    """Scales are stored in fp16. A level that was chosen for another scale is the wrong one at run time."""
    for size in (1.0, 1e-3, 1e-7):
        weight = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * size
        scale = mine.cls.find(weight, GPTQConfig(3)).scale
        assert torch.equal(scale, scale.half().float()), f"weights of about {size}: scales change when stored in fp16"
        assert scale.min() > 0, f"weights of about {size}: a scale is 0, and weight / scale is not a number"


@check("unit", spec="R7.6", hint=3)
def a_group_of_zeros(mine: Mine) -> None:
    """A group without any weight other than 0 has no span, and still a grid."""
    for config in (asym(4), GPTQConfig(4)):
        grid = found(mine.cls, [0.0, 0.0], config)
        values = grid.values(grid.levels(torch.zeros(1, 2)))
        assert grid.scale.item() > 0 and values.tolist() == [[0.0, 0.0]], (
            f"the grid of [0, 0] has the scale {grid.scale.item()} and gives {values.tolist()}, expected zeros"
        )


@check("unit", spec="R7.6", hint=1)
def every_output_has_its_own_grid(mine: Mine) -> None:
    """One scale for the whole group would be set by the output with the largest weights."""
    weight = torch.tensor([[0.01, -0.02], [10.0, -20.0]])
    grid = mine.cls.find(weight, asym(4))
    ratio = (grid.scale[1] / grid.scale[0]).item() if grid.scale.numel() == 2 else 1.0
    assert abs(ratio - 1000) < 20, f"outputs with weights around 0.02 and 20 have the scales {grid.scale.tolist()}"


@check("unit", spec="R7.6", hint=2)
def a_single_column_is_taken_too(mine: Mine) -> None:
    """GPTQ rounds one column [output_size] after the other, in the grids of its group."""
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    grid = mine.cls.find(weight, GPTQConfig(4))
    whole = grid.levels(weight)
    assert whole.dtype == torch.float32, f"levels have the dtype {whole.dtype}, expected fp32"
    for i in range(8):
        column = grid.levels(weight[:, i])
        assert list(column.shape) == [5], (
            f"levels of a column [5] have the shape {list(column.shape)}, expected [5]: scale is [5] too, and only for "
            "weights [5, n] does it need a dimension more"
        )
        assert torch.equal(column, whole[:, i]), (
            f"column {i} alone has the levels {column.tolist()}, and {whole[:, i].tolist()} as a part of the group"
        )
        alone, together = grid.values(column), grid.values(whole)[:, i]
        assert torch.equal(alone, together), (
            f"the levels of column {i} alone stand for {alone.tolist()}, and for {together.tolist()} in the group"
        )


@check("unit", spec="R7.6", hint=2)
def a_tie_does_not_depend_on_the_zero_point(mine: Mine) -> None:
    """torch.round takes a half to the even number, so it matters that the zero is added after rounding."""
    weights = torch.tensor([[0.25, 0.75, 1.25]])  # with a scale of 0.5: 0.5, 1.5 and 2.5 steps
    for zero in (1.0, 2.0):
        levels = mine.cls(torch.tensor([0.5]), torch.tensor([zero]), 15).levels(weights).tolist()[0]
        wanted = [zero, zero + 2, zero + 2]
        assert levels == wanted, (
            f"scale 0.5, zero {zero:.0f}: the weights 0.25, 0.75 and 1.25 got the levels {levels}, expected {wanted}: "
            "round first, then add the zero"
        )


@check("property", spec="R7.6", hint=2)
def no_weight_moves_more_than_half_a_step(mine: Mine) -> None:
    """Rounding to nearest moves a weight by at most half a scale, and rounding twice changes nothing."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(3, 2 + seed, generator=generator) + torch.randn(1, generator=generator)
        config = (asym(2), asym(3), asym(4), GPTQConfig(4), GPTQConfig(8))[seed % 5]
        grid = mine.cls.find(weight, config)
        levels = grid.levels(weight)
        case = f"{weight.shape[1]} random weights, {config.bits} bits, {'sym' if config.sym else 'asym'}"
        assert levels.min() >= 0 and levels.max() <= config.max_level, f"{case}: levels reach {levels.max()}"
        moved = ((grid.values(levels) - weight).abs() / grid.scale[:, None]).max().item()
        assert moved < 0.5 + 0.01 * config.bits, f"{case}: a weight moved by {moved:.3f} of a scale, expected 0.5"
        again = grid.levels(grid.values(levels))
        assert torch.equal(again, levels), f"{case}: rounding the rounded weights again gives other levels"


@check("engine", spec="R7.6", hint=3)
def the_same_checkpoint(mine: Mine) -> None:
    """The quantiser, with your grid, writes the checkpoint that it writes with its own."""
    for config in (GPTQConfig(4, 32), GPTQConfig(4, 32, sym=False)):
        with tempfile.TemporaryDirectory(prefix="folovllm-learn-") as folder:
            theirs, own = Path(folder, "theirs"), Path(folder, "own")
            for out, parts in ((theirs, {}), (own, dict(mine.parts))):
                settings = QuantizeSettings(config, "rtn", parts=parts)
                quantize_checkpoint(Path(tiny_model()), out, settings, progress=False)
            for file in sorted(theirs.glob("*.safetensors")):
                own_tensors = load_file(own / file.name)
                for name, wanted in load_file(file).items():
                    different = int((own_tensors[name] != wanted).sum())
                    assert different == 0, (
                        f"{'symmetric' if config.sym else 'asymmetric'}, 4 bits, groups of 32: {different:,} of "
                        f"{wanted.numel():,} numbers of {name} are not what the engine's own grid gives (qweight holds "
                        "levels, eight in a number; qzeros zero points; scales the scales)"
                    )
