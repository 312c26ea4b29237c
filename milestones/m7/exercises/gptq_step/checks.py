"""Checks of m7/gptq_step."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from folovllm.gptq_config import GPTQConfig
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import tiny_model
from folovllm.quantize.gptq import GPTQ, output_error, rtn_quantize
from folovllm.quantize.grid import Grid
from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint

H = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def prediction() -> str:
    gptq, weight = GPTQ(GPTQConfig(4)), torch.tensor([[0.3, 1.0]])
    root = gptq.inverse_root(torch.tensor([[4.0, -2.0], [-2.0, 4.0]], dtype=torch.float64))
    assert root is not None, "this H is positive definite"
    gptq.step(weight, 0, torch.tensor([0.5]), root.float())
    return (
        f"{weight[0, 1].item():.2f}\nThe first weight gained 0.2, and the second gains half of it: the inputs are half "
        "alike with opposite signs, so what the first adds to the output the second takes away."
    )


def two_by_two(cls: Any) -> tuple[list[float], float]:
    """The weights 0.3 and 1.0 after the first was fixed at 0, and the error that step returned. U is the exact one."""
    root = torch.tensor([[(2 / 3) ** 0.5, -((1 / 6) ** 0.5)], [0.0, 0.5**0.5]])
    weight = torch.tensor([[0.3, 1.0]])
    error = cls(GPTQConfig(4)).step(weight, 0, torch.tensor([0.0]), root)
    kind = f"a tensor {list(error.shape)}" if isinstance(error, torch.Tensor) else f"{error!r}"
    assert kind == "a tensor [1]", f"for one output step returned {kind}, expected the error, a tensor [1]"
    return weight.tolist()[0], error.item()


def layer(size: int, seed: int, strength: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [12, size], H [size, size]) of correlated inputs of different strength, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(size) + torch.randn(size, size, generator=generator) / size**0.5
    x = torch.randn(400, size, generator=generator) @ mixing * (torch.rand(size, generator=generator) * strength + 0.1)
    return torch.randn(12, size, generator=generator), x.t() @ x


def best_answer(weight: torch.Tensor, fixed: dict[int, torch.Tensor], hessian: torch.Tensor) -> torch.Tensor:
    """The weights nearest in output to the original ones, with the columns in `fixed` given: solved afresh, in fp64."""
    weight, hessian = weight.double(), hessian.double()
    known, free = sorted(fixed), [i for i in range(weight.shape[1]) if i not in fixed]
    answer = weight.clone()
    answer[:, known] = torch.stack([fixed[i].double() for i in known], dim=1)
    moved = (weight[:, known] - answer[:, known]) @ hessian[known][:, free]
    answer[:, free] += torch.linalg.solve(hessian[free][:, free], moved, left=False)
    return answer


@check("unit", spec="R7.1", hint=2)
def two_by_two_by_hand(mine: Mine) -> None:
    """H = [[2, 1], [1, 2]]: half of an error of the first column is made up for by the second."""
    weights, error = two_by_two(mine.cls)
    assert abs(weights[0]) < 1e-6, f"the first weight was fixed at 0 and is {weights[0]:.4f}"
    assert abs(weights[1] - 1.15) < 1e-5, (
        f"0.3 was fixed at 0, and the second weight went from 1.0 to {weights[1]:.4f}, expected 1.15 = 1.0 + 0.3 / 2"
    )
    assert abs(error - 0.3 * 1.5**0.5) < 1e-5, (
        f"step returned the error {error:.4f}, expected 0.3 / U[0, 0] = {0.3 * 1.5**0.5:.4f}: later blocks multiply it "
        "by their part of U"
    )


@check("unit", spec="R7.1", hint=2)
def fixed_columns_stay(mine: Mine) -> None:
    """Columns before `column` are fixed already. A step that moves them takes back what was rounded."""
    weight, hessian = layer(6, 0)
    root, before = GPTQ(GPTQConfig(4)).damped_root(hessian), weight.clone()
    mine.cls(GPTQConfig(4)).step(weight, 3, torch.zeros(12), root)
    moved = (weight - before)[:, :3].abs().max().item()
    assert moved == 0.0, f"step(column=3) moved an earlier column by {moved:.4f}; expected them unchanged"
    assert weight[:, 3].abs().max() < 1e-5, f"column 3 was fixed at 0 and holds up to {weight[:, 3].abs().max():.4f}"
    assert (weight - before)[:, 4:].abs().max() > 1e-3, "step(column=3) moved no later column: nothing makes up for it"


@check("unit", spec="R7.1", hint=3)
def the_root_of_the_inverse(mine: Mine) -> None:
    """U is upper triangular with U^T U = H^-1: row i says how the free columns answer to column i."""
    root = mine.cls(GPTQConfig(4)).inverse_root(H)
    assert root is not None, "inverse_root([[2, 1], [1, 2]]) is None, and the matrix is positive definite"
    assert root.dtype == torch.float64, f"U is {root.dtype}, expected fp64 as H is: H of real layers is ill-conditioned"
    wanted = [[0.8165, -0.4082], [0.0, 0.7071]]
    found = [[round(x, 4) + 0.0 for x in row] for row in root.tolist()]
    assert found == wanted, f"the U of [[2, 1], [1, 2]] is {found}, expected {wanted}"
    _, hessian = layer(40, 1)
    root = mine.cls(GPTQConfig(4)).inverse_root(hessian.double())
    assert torch.equal(root, root.triu()), "U has entries below its diagonal: columns that are fixed would be moved"
    error = (root.t() @ root @ hessian.double() - torch.eye(40, dtype=torch.float64)).abs().max().item()
    assert error < 1e-6, f"U^T U H differs from the identity by {error:.2g}: U is not the root of the inverse"


@check("unit", spec="R7.5", hint=3)
def not_positive_definite_is_none(mine: Mine) -> None:
    """With fewer tokens than inputs H has no inverse. The caller adds damping and asks again."""
    singular = torch.ones(3, 3, dtype=torch.float64) - 2 * torch.eye(3, dtype=torch.float64)
    found = mine.cls(GPTQConfig(4)).inverse_root(singular)
    assert found is None, f"inverse_root of a matrix that is not positive definite is {found}, expected None"


@check("unit", spec="R7.4", hint=3)
def the_strongest_inputs_first(mine: Mine) -> None:
    """Act-order goes by falling diagonal of H, and equal ones keep their order; without it nothing moves."""
    diagonal = torch.tensor([1.0, 9.0, 4.0, 9.0, 0.5, 4.0])
    order = mine.cls(GPTQConfig(4, desc_act=True)).column_order(torch.diag(diagonal))
    assert isinstance(order, torch.Tensor), f"column_order returned {type(order).__name__}, expected a tensor"
    assert order.tolist() == [1, 3, 2, 5, 0, 4], (
        f"the diagonal {diagonal.tolist()} gives the order {order.tolist()}, expected [1, 3, 2, 5, 0, 4]: the "
        "strongest first, while most others can still make up for them"
    )
    order = mine.cls(GPTQConfig(4)).column_order(torch.diag(diagonal)).tolist()
    assert order == [0, 1, 2, 3, 4, 5], f"without act-order the order is {order}, expected 0, 1, 2, ..."


@check("property", spec="R7.1", hint=1)
def every_step_is_the_closed_form(mine: Mine) -> None:
    """After each step the free columns are the least squares solution, solved afresh."""
    for size in (2, 3, 8):
        for seed in range(5):
            original, hessian = layer(size, seed)
            gptq, grid = mine.cls(GPTQConfig(3), damp=0.0), Grid.find(original, GPTQConfig(3))
            root, work, fixed = gptq.damped_root(hessian), original.clone(), {}
            for column in range(size):
                fixed[column] = grid.values(grid.levels(work[:, column]))
                gptq.step(work, column, fixed[column], root)
                error = (work.double() - best_answer(original, fixed, hessian)).abs().max().item()
                assert error < 1e-3, (
                    f"{size} inputs, seed {seed}: after column {column} the weights are {error:.3g} away from the "
                    "least squares answer to what is fixed"
                )


@check("property", spec="R7.2", hint=2)
def layer_error_below_rounding(mine: Mine) -> None:
    """On 20 layers, what is lost of the outputs is less than with rounding to nearest."""
    for seed in range(20):
        weight, hessian = layer(32, seed)
        for config in (GPTQConfig(4, 16), GPTQConfig(3, 16, desc_act=True)):
            found = output_error(weight, mine.cls(config).quantize(weight, hessian).dequantize(), hessian)
            nearest = output_error(weight, rtn_quantize(weight, config).dequantize(), hessian)
            assert found < 0.9 * nearest, (
                f"layer {seed}, {config.bits} bits{', act-order' if config.desc_act else ''}: {found:.2%} of the "
                f"outputs are lost, and {nearest:.2%} with rounding to nearest; expected less than nine tenths of it"
            )


@check("property", spec="R7.2", hint=1)
def without_correlation_it_is_rounding(mine: Mine) -> None:
    """If no two inputs have anything in common, no weight can make up for another."""
    weight, config = layer(64, 0)[0], GPTQConfig(4, 32)
    hessian = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5)
    levels = mine.cls(config).quantize(weight, hessian).levels
    different = int((levels != rtn_quantize(weight, config).levels).sum())
    assert different == 0, f"with a diagonal H {different} of {levels.numel()} levels differ from rounding to nearest"


@check("engine", spec="R7.2", hint=3)
def a_whole_model(mine: Mine) -> None:
    """The quantiser, with your step, loses no more of any layer's outputs than with its own."""
    windows = [[(7 * i + 11 * j * j) % 500 for i in range(1, 33)] for j in range(8)]
    for desc_act in (False, True):
        config, errors = GPTQConfig(4, 32, desc_act=desc_act), []
        with tempfile.TemporaryDirectory(prefix="folovllm-learn-") as folder:
            for name, parts in (("theirs", {}), ("own", dict(mine.parts))):
                settings = QuantizeSettings(config, parts=parts)
                out = Path(folder, name)
                errors.append(quantize_checkpoint(Path(tiny_model()), out, settings, windows, progress=False))
                assert len(load_file(out / "model-00002-of-00003.safetensors")) > 20, f"{name}: the file lacks tensors"
        for theirs, own in zip(*errors, strict=True):
            assert own.error is not None and theirs.error is not None and own.error <= 1.05 * theirs.error + 1e-6, (
                f"layer {own.layer}, {own.linear}: {own.error:.2e} of the outputs are lost with your step, and "
                f"{theirs.error:.2e} with the engine's own"
            )
