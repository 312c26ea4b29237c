"""Linear layers as tensor parallelism cuts them, fused where a model has several with one input.

Milestone: M1 (the layers), M9 (several ranks). vLLM counterpart: vllm/model_executor/layers/linear.py. Left out: bias
skipping, vLLM's parameter classes, outputs that are gathered or inputs that are split between two layers.

`tp` is the layer's end of the group of ranks that share it. A column-parallel layer, then a row-parallel one, is the
pattern of attention and of the MLP alike (Shoeybi et al. 2019, "Megatron-LM", section 3):

    x on every rank -> column-parallel -> own outputs -> row-parallel -> partial sums -> all_reduce -> sums everywhere

A layer knows its shapes and shards; *how* it multiplies is its `quant_method`'s business. That slot is where GPTQ (M7)
and the fast CPU path (M4) enter, and why no model file ever mentions them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from folovllm.distributed.communicator import SINGLE_RANK, Communicator
from folovllm.model_executor.parameter import copy_shard, load_whole, new_parameter


class LinearMethodBase(ABC):
    """Creates a linear layer's parameters and multiplies with them."""

    @abstractmethod
    def create_weights(self, layer: "LinearBase") -> None:
        """Register the parameters on `layer`, each with its `weight_loader`."""

    def process_weights_after_loading(self, layer: "LinearBase") -> None:  # noqa: B027 - optional
        """Repack, once everything is loaded."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, input_size] -> [num_tokens, output_size], bias included."""


class QuantizationConfig(Protocol):
    """What decides the method of a layer, by its name in the model (e.g. "model.layers.3.mlp.down_proj")."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None: ...


class UnquantizedLinearMethod(LinearMethodBase):
    """Plain weights, plain matmul."""

    def create_weights(self, layer: "LinearBase") -> None:
        layer.weight = new_parameter(layer.output_size, layer.input_size, weight_loader=layer.weight_loader)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]


class LinearBase(nn.Module):
    """One rank's part of a linear layer: `input_size` and `output_size` are the part's, not the whole's.

    `weight_loader(param, loaded_weight, shard_id)` finds the place of a tensor from the checkpoint. It serves weight
    and bias, and any parameter of a quant method whose `output_dim` attribute says along which axis outputs lie.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = False,
        *,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        tp: Communicator = SINGLE_RANK,
    ) -> None:
        super().__init__()
        self.input_size, self.output_size = input_size, output_size
        self.tp = tp
        method = quant_config.get_quant_method(self, prefix) if quant_config is not None else None
        self.quant_method = method or UnquantizedLinearMethod()
        self.quant_method.create_weights(self)
        self.bias = new_parameter(output_size, weight_loader=self.weight_loader) if bias else None

    def output_parts(self) -> dict[Any, int]:
        """The checkpoint's layers in this one, in output order: shard_id -> output features. One, unless fused."""
        return {None: self.output_size}

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x)


class ColumnParallelLinear(LinearBase):
    """Output features are divided among ranks: each computes its own, from the whole input."""

    def __init__(
        self, input_size: int, output_size: int, bias: bool = False, *, tp: Communicator = SINGLE_RANK, **kwargs: Any
    ) -> None:
        super().__init__(input_size, divide(output_size, tp.size), bias, tp=tp, **kwargs)

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        copy_shard(param.data, loaded_weight, output_dim(param), self.tp.rank, self.tp.size)


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel layers with one input, as one matmul. shard_id is the index of the layer.

    E.g. gate and up of 8 features each, 2 ranks: rank 0 holds [gate 0-3 | up 0-3], not gate alone.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = False,
        *,
        tp: Communicator = SINGLE_RANK,
        **kwargs: Any,
    ) -> None:
        self.shard_sizes = [divide(size, tp.size) for size in output_sizes]
        super().__init__(input_size, sum(self.shard_sizes), bias, tp=tp, **kwargs)

    def output_parts(self) -> dict[Any, int]:
        return dict(enumerate(self.shard_sizes))

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        start = sum(self.shard_sizes[:shard_id])
        load_fused_shard(param, loaded_weight, start, self.shard_sizes[shard_id], self)


class QKVParallelLinear(LinearBase):
    """Query, key and value projections as one matmul: output rows [q | k | v]. shard_id is "q", "k" or "v".

    With more ranks than KV heads, a KV head lives on several ranks. E.g. 2 KV heads, 4 ranks: ranks 0, 1 hold head 0.
    `num_heads` and `num_kv_heads` become the rank's own.
    """

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        num_heads: int,
        num_kv_heads: int,
        bias: bool = False,
        *,
        tp: Communicator = SINGLE_RANK,
        **kwargs: Any,
    ) -> None:
        self.num_heads = divide(num_heads, tp.size)
        self.num_kv_heads = divide(num_kv_heads, min(tp.size, num_kv_heads))
        self.kv_copies = divide(tp.size, min(tp.size, num_kv_heads))  # ranks that share one KV head
        self.q_size, self.kv_size = self.num_heads * head_size, self.num_kv_heads * head_size
        super().__init__(hidden_size, self.q_size + 2 * self.kv_size, bias, tp=tp, **kwargs)

    def output_parts(self) -> dict[Any, int]:
        return {"q": self.q_size, "k": self.kv_size, "v": self.kv_size}

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        start = {"q": 0, "k": self.q_size, "v": self.q_size + self.kv_size}[shard_id]
        size = self.q_size if shard_id == "q" else self.kv_size
        load_fused_shard(param, loaded_weight, start, size, self, copies=1 if shard_id == "q" else self.kv_copies)


class RowParallelLinear(LinearBase):
    """Input features are divided among ranks, and the partial sums are added over all of them.

    The bias is rank 0's. If every rank added it, the sum would contain it several times.
    """

    def __init__(
        self, input_size: int, output_size: int, bias: bool = False, *, tp: Communicator = SINGLE_RANK, **kwargs: Any
    ) -> None:
        super().__init__(divide(input_size, tp.size), output_size, bias, tp=tp, **kwargs)

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
        if param.dim() > 1:
            copy_shard(param.data, loaded_weight, 1 - output_dim(param), self.tp.rank, self.tp.size)
            return
        load_whole(param, loaded_weight)  # a bias has no input axis
        if self.tp.rank > 0:
            param.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, input_size] -> [num_tokens, output_size], the whole sum on every rank."""
        return self.tp.all_reduce(self.quant_method.apply(self, x))


def load_fused_shard(
    param: nn.Parameter, loaded_weight: torch.Tensor, start: int, size: int, layer: LinearBase, copies: int = 1
) -> None:
    """Copy this rank's piece of one fused layer into outputs start .. start + size of `param`.

    A quant method that packs p outputs into one number marks it as `packed_factor`; positions shrink by that. It may
    be a Fraction: 32 outputs of 3 bits lie in 3 words.
    """
    factor = getattr(param, "packed_factor", 1)
    dim = output_dim(param)
    target = param.data.narrow(dim, divide(start, factor), divide(size, factor))
    copy_shard(target, loaded_weight, dim, layer.tp.rank // copies, layer.tp.size // copies)


def output_dim(param: nn.Parameter) -> int:
    """The axis of output features: 0 for plain weights [output, input] and biases."""
    return getattr(param, "output_dim", 0)


def divide(total: int, parts: int) -> int:
    assert total % parts == 0, f"{total} does not divide into {parts}"
    return total // parts
