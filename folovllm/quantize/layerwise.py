"""One decoder layer at a time: built, filled, run and dropped, so that a model need not fit into memory.

Milestone: M7. vLLM counterpart: none. GPTQModel and AutoGPTQ hold the whole model and move layers to the GPU in turn.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.no_cache import NoCacheBackend
from folovllm.attention.layer import Attention
from folovllm.forward_context import set_forward_context
from folovllm.hf_config import ModelArchitecture
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from folovllm.model_executor.models.llama import LlamaDecoderLayer
from folovllm.model_executor.models.registry import get_model_class
from folovllm.model_executor.weight_utils import load_weights, refuse, safetensors_files

EMBEDDING = "model.embed_tokens.weight"


class TensorFolder:
    """The tensors of a checkpoint by name; one is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        for path in safetensors_files(folder):
            with safe_open(path, framework="pt") as file:
                self.files |= dict.fromkeys(file.keys(), path)

    def get(self, name: str) -> torch.Tensor:
        if name not in self.files:
            refuse(f"the tensor {name!r}", "none in the checkpoint", "download the model again")
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def items(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """(name without `prefix`, tensor) of every tensor below it."""
        for name in sorted(self.files):
            if name.startswith(prefix):
                yield name.removeprefix(prefix), self.get(name)


class LayerRunner:
    """Decoder layers of a plain checkpoint, in fp32, each attending within one sequence at a time."""

    def __init__(self, tensors: TensorFolder, arch: ModelArchitecture) -> None:
        self.tensors, self.arch = tensors, arch
        self.model_class = get_model_class(arch.architecture)
        self.rotary = RotaryEmbedding(arch.head_dim, arch.max_position_embeddings, arch.rope)
        self.packed_modules = self.model_class.packed_modules_mapping

    def embed(self, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """What enters the first layer: [length, hidden_size] fp32 of each sequence."""
        table = self.tensors.get(EMBEDDING)  # [vocab_size, hidden_size]; dropped on return
        return [table[torch.tensor(window)].float() for window in windows]

    def load_layer(self, index: int) -> LlamaDecoderLayer:
        prefix = f"model.layers.{index}"
        layer = self.model_class.decoder_layer_class(self.arch, None, prefix)
        load_weights(layer, self.tensors.items(f"{prefix}."), self.packed_modules)
        bind_no_cache(layer, self.arch)
        return layer.eval().requires_grad_(False)

    @torch.inference_mode()
    def run(self, layer: LlamaDecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [length, hidden_size], the residual added, -> the same after `layer`."""
        rows = self.rotary.rows(torch.arange(hidden.shape[0]), hidden.dtype)
        with set_forward_context(single_sequence(hidden.shape[0])):
            # The layer's first norm adds its two inputs into the second, in place: hence a fresh tensor of zeros.
            out, residual = layer(hidden, torch.zeros_like(hidden), rows)
        return out + residual

    def inputs_of(
        self, linear: nn.Module, layer: LlamaDecoderLayer, states: Sequence[torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """What `linear` gets to see in `layer`, [length, input_size] per sequence; nothing after it is computed."""
        caught: list[torch.Tensor] = []
        handle = linear.register_forward_pre_hook(_stop_at(caught))
        try:
            for hidden in states:
                try:
                    self.run(layer, hidden)
                except _StopForward:
                    yield caught.pop()
        finally:
            handle.remove()


class _StopForward(Exception):
    """The forward pass has come to where it was to end."""


def _stop_at(caught: list[torch.Tensor]) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        caught.append(inputs[0])
        raise _StopForward

    return hook


def linears_of(layer: nn.Module) -> list[tuple[str, LinearBase]]:
    """(name, linear) in the order in which they run: qkv, o, gate and up, down."""
    return [(name, module) for name, module in layer.named_modules() if isinstance(module, LinearBase)]


def bind_no_cache(module: nn.Module, arch: ModelArchitecture, dtype: torch.dtype = torch.float32) -> None:
    """Let every attention layer in `module` see one sequence, without a KV cache."""
    spec = AttentionSpec(
        arch.num_attention_heads,
        arch.num_key_value_heads,
        arch.head_dim,
        dtype,
        torch.device("cpu"),
        block_size=1,
    )
    for part in module.modules():
        if isinstance(part, Attention):
            part.bind(NoCacheBackend(spec), torch.empty(0))


def single_sequence(length: int) -> AttentionMetadata:
    nothing = torch.empty(0, dtype=torch.int64)
    return AttentionMetadata([0, length], [length], nothing, nothing, block_size=1)
