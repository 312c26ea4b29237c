"""Checks of m9/row_split."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.distributed.communicator import SINGLE_RANK, Communicator
from folovllm.distributed.thread_communicator import run_ranks
from folovllm.hf_config import ModelArchitecture
from folovllm.learn.check import Mine, check
from folovllm.model_executor.layers.linear import RowParallelLinear
from folovllm.model_executor.models.llama import LlamaMLP
from folovllm.model_executor.parameter import ShapeMismatchError
from folovllm.model_shapes import shape_architecture

DEADLINE = 5.0  # seconds: a rank that does not take part is noticed by then


def prediction() -> str:
    found = on_ranks(RowParallelLinear, 2, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([10.0]), torch.ones(1, 4))
    (result,) = {result.item() for result in found}
    return (
        f"{result + 10:.0f}\nOnce too often: the right result is {result:.0f}, and a second rank adds the bias again."
    )


class Alone(Communicator):
    """Rank `rank` of a group whose others are not there: what it would hand over is returned as it is."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.counts.add("all_reduce", tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        raise AssertionError("all_gather was called: a row-parallel layer needs the sum of the ranks' results")

    def send(self, tensor: torch.Tensor, destination: int) -> None:
        raise AssertionError("send was called")

    def receive(self, shape: Any, dtype: torch.dtype, source: int) -> torch.Tensor:
        raise AssertionError("receive was called")


def loaded(cls: Any, tp: Communicator, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """A layer of one rank, filled from the whole weight [outputs, inputs] and bias [outputs]."""
    layer = cls(weight.shape[1], weight.shape[0], bias is not None, tp=tp)
    for param in (layer.weight, layer.bias):
        if param is not None:
            param.data.fill_(float("nan"))  # what is not loaded shows
    layer.weight.weight_loader(layer.weight, weight)
    if bias is not None:
        layer.bias.weight_loader(layer.bias, bias)
    return layer


def on_ranks(
    cls: Any, size: int, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor
) -> list[torch.Tensor]:
    """What every rank of a group returns for its columns of x [num_tokens, inputs]."""

    def one_rank(tp: Communicator) -> torch.Tensor:
        layer = loaded(cls, tp, weight, bias)
        result = layer.forward(x.chunk(size, dim=1)[tp.rank].contiguous())
        assert isinstance(result, torch.Tensor), f"forward returned {result!r} on rank {tp.rank}, expected a tensor"
        return result.clone()

    return run_ranks(size, one_rank, deadline=DEADLINE)


@check("unit", spec="R9.3", hint=2)
def each_rank_loads_its_inputs(mine: Mine) -> None:
    """Two ranks, four inputs: the left two columns and the right two."""
    weight = torch.arange(12.0).view(3, 4)
    for rank, wanted in enumerate((weight[:, :2], weight[:, 2:])):
        found = loaded(mine.cls, Alone(rank, 2), weight, None).weight
        assert torch.equal(found, wanted), (
            f"rank {rank} of 2 loaded {found.tolist()} from the weight {weight.tolist()}, expected {wanted.tolist()}: "
            "the columns of its inputs"
        )


@check("unit", spec="R9.3", hint=2)
def the_axis_of_the_inputs_may_be_the_first(mine: Mine) -> None:
    """GPTQ stores [inputs, outputs], and says so with output_dim = 1."""
    layer = mine.cls(4, 3, tp=Alone(1, 2))
    param = nn.Parameter(torch.zeros(2, 3, dtype=torch.int32), requires_grad=False)
    param.output_dim = 1  # type: ignore[attr-defined]
    whole = torch.arange(12, dtype=torch.int32).view(4, 3)
    try:
        layer.weight_loader(param, whole)
    except ShapeMismatchError as error:
        raise AssertionError(f"a weight [4, 3] with output_dim 1 was refused on rank 1 of 2: {error}") from error
    assert torch.equal(param.data, whole[2:]), (
        f"rank 1 of 2 loaded {param.data.tolist()} from {whole.tolist()} with output_dim 1, expected the last two rows"
    )


@check("unit", spec="R9.3", hint=1)
def the_bias_counts_once(mine: Mine) -> None:
    """The results of the ranks are added, so the biases must add up to the bias."""
    bias = torch.tensor([1.0, -2.0, 4.0])
    layers = [loaded(mine.cls, Alone(rank, 3), torch.zeros(3, 6), bias) for rank in range(3)]
    total = torch.stack([layer.bias.data for layer in layers]).sum(0)
    assert torch.equal(total, bias), (
        f"the biases of 3 ranks add up to {total.tolist()}, expected {bias.tolist()}: only rank 0 keeps the bias"
    )
    assert torch.equal(layers[0].bias.data, bias), "rank 0 must keep the bias: the others hold zeros"


@check("unit", spec="R9.3", hint=2)
def a_wrong_shape_is_refused_on_every_rank(mine: Mine) -> None:
    """A checkpoint that does not fit must not load on some ranks and fail on others."""
    for rank in range(2):
        for weight, bias in ((torch.zeros(3, 6), torch.zeros(3)), (torch.zeros(3, 4), torch.zeros(4))):
            layer = mine.cls(4, 3, True, tp=Alone(rank, 2))
            try:
                layer.weight.weight_loader(layer.weight, weight)
                layer.bias.weight_loader(layer.bias, bias)
            except ShapeMismatchError:
                continue
            raise AssertionError(
                f"rank {rank} of 2 loaded a weight {list(weight.shape)} and a bias {list(bias.shape)} into a layer of "
                "4 inputs and 3 outputs without an error"
            )


@check("unit", spec="R9.3", hint=3)
def the_example(mine: Mine) -> None:
    """Both ranks return the whole sum: 20."""
    found = on_ranks(mine.cls, 2, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([10.0]), torch.ones(1, 4))
    results = [result.tolist() for result in found]
    assert results == [[[20.0]], [[20.0]]], f"the ranks returned {results}, expected [[20.0]] from each"


@check("unit", spec="R9.3", hint=3)
def one_all_reduce_per_call(mine: Mine) -> None:
    """The ranks meet once, with a partial sum of all outputs."""
    tp = Alone(1, 2)
    layer = loaded(mine.cls, tp, torch.ones(3, 4), None)
    result = layer.forward(torch.ones(5, 2))
    assert isinstance(result, torch.Tensor) and list(result.shape) == [5, 3], (
        f"forward of 5 tokens returned {getattr(result, 'shape', result)}, expected [5, 3]"
    )
    assert tp.counts.calls == {"all_reduce": 1}, f"forward made the calls {tp.counts.calls}, expected one all_reduce"
    assert tp.counts.bytes == {"all_reduce": 60}, (
        f"forward handed over {tp.counts.bytes} bytes, expected 5 tokens * 3 outputs * 4 bytes = 60"
    )


@check("unit", spec="R9.3", hint=3)
def one_rank_is_an_ordinary_layer(mine: Mine) -> None:
    """In a group of one, nothing is cut and nothing is said."""
    weight, bias = torch.arange(12.0).view(3, 4), torch.tensor([1.0, 2.0, 3.0])
    layer, x = loaded(mine.cls, SINGLE_RANK, weight, bias), torch.ones(2, 4)
    found = layer.forward(x)
    assert torch.equal(found, F.linear(x, weight, bias)), f"one rank returned {found.tolist()}"


@check("property", spec="R9.3", hint=3)
def the_ranks_compute_what_one_computes(mine: Mine) -> None:
    """Random layers on 1 to 4 ranks: every rank has the whole result."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        size, outputs, tokens = 1 + seed % 4, 1 + seed % 5, 1 + seed % 3
        inputs = size * (1 + seed % 6)
        weight = torch.randn(outputs, inputs, generator=generator)
        bias = torch.randn(outputs, generator=generator) if seed % 2 else None
        x = torch.randn(tokens, inputs, generator=generator)
        wanted = F.linear(x, weight, bias)
        case = f"{inputs} inputs, {outputs} outputs, {'a' if bias is not None else 'no'} bias, {size} ranks"
        for rank, found in enumerate(on_ranks(mine.cls, size, weight, bias, x)):
            assert found.shape == wanted.shape, f"{case}: rank {rank} returned the shape {list(found.shape)}"
            difference = (found - wanted).abs().max().item()
            assert difference < 1e-4, f"{case}: rank {rank} is off by {difference:.3g}"


def mlp_of_a_rank(cls: Any, arch: ModelArchitecture, tp: Communicator) -> LlamaMLP:
    """The engine's MLP with the learner's layer behind its column-parallel one."""
    mlp = LlamaMLP(arch, None, "mlp", tp)
    mlp.down_proj = cls(arch.intermediate_size, arch.hidden_size, tp=tp)
    return mlp


@check("engine", spec="R9.3", hint=3)
def the_engines_mlp_runs_on_it(mine: Mine) -> None:
    """gate and up by columns, the activation, then down by rows: the MLP of a real layer, on 1, 2 and 3 ranks."""
    arch = shape_architecture("smollm2-135m")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(*shape, generator=generator) / 30
        for name, shape in (
            ("gate", (arch.intermediate_size, arch.hidden_size)),
            ("up", (arch.intermediate_size, arch.hidden_size)),
            ("down", (arch.hidden_size, arch.intermediate_size)),
        )
    }
    x = torch.randn(4, arch.hidden_size, generator=generator)
    gate, up = F.linear(x, weights["gate"]), F.linear(x, weights["up"])
    wanted = F.linear(F.silu(gate) * up, weights["down"])

    def work(size: int) -> Callable[[Communicator], torch.Tensor]:
        def one_rank(tp: Communicator) -> torch.Tensor:
            mlp = mlp_of_a_rank(mine.cls, arch, tp)
            for shard, name in enumerate(("gate", "up")):
                mlp.gate_up_proj.weight_loader(mlp.gate_up_proj.weight, weights[name], shard)
            mlp.down_proj.weight_loader(mlp.down_proj.weight, weights["down"])
            return mlp(x).clone()

        return one_rank

    for size in (1, 2, 3):
        for rank, found in enumerate(run_ranks(size, work(size), deadline=DEADLINE)):
            difference = (found - wanted).abs().max().item()
            assert difference < 1e-3, f"the MLP of SmolLM2 on {size} ranks: rank {rank} is off by {difference:.3g}"
