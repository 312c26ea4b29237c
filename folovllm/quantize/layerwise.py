"""One decoder layer at a time: built, filled, run and dropped, so that a model need not fit into memory.

Milestone: M7. vLLM counterpart: none. GPTQModel and AutoGPTQ hold the whole model and move layers to the GPU in turn.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional as F

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.no_cache import NoCacheBackend
from folovllm.attention.layer import Attention
from folovllm.forward_context import set_forward_context
from folovllm.hf_config import ModelArchitecture
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from folovllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer
from folovllm.model_executor.models.registry import get_model_class
from folovllm.model_executor.weight_utils import load_weights, locate_tensors, refuse, safetensors_files

DOWNLOAD_AGAIN = "download the model again"
EMBEDDING = "model.embed_tokens.weight"


class TensorFolder:
    """The tensors of a checkpoint by name. Each one is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.files = locate_tensors(safetensors_files(folder))

    def get(self, name: str) -> torch.Tensor:
        if name not in self.files:
            refuse(f"the tensor {name!r}", "none in the checkpoint", DOWNLOAD_AGAIN)
        with _opened(self.files[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def items(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name without `prefix`, tensor) for every tensor whose name starts with `prefix`."""
        for name in sorted(self.files):
            if name.startswith(prefix):
                yield name.removeprefix(prefix), self.get(name)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        refuse("a whole safetensors file", f"{path.name} of {path.stat().st_size:,} bytes ({error})", DOWNLOAD_AGAIN)


class LayerRunner:
    """Decoder layers of a plain checkpoint, in fp32, each attending within one sequence at a time."""

    def __init__(self, tensors: TensorFolder, arch: ModelArchitecture) -> None:
        self.tensors, self.arch = tensors, arch
        self.model_class = get_model_class(arch.architecture)
        self.rotary = RotaryEmbedding(arch.head_dim, arch.max_context_len, arch.rope)
        self.packed_modules = self.model_class.packed_modules_mapping

    def embed(self, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """What enters the first layer: [length, hidden_size] fp32 of each sequence."""
        if self.arch.rope.rope_type != "dynamic":  # whose angles depend on the longest text that the model can hold
            self.rotary.build(max(map(len, windows)), torch.float32, torch.device("cpu"))
        table = self.tensors.get(EMBEDDING)  # [vocab_size, hidden_size]; dropped on return
        return [table[torch.tensor(window)].float() for window in windows]

    def _cos_sin(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the positions of hidden [length, hidden_size], each [length, 1, head_size]."""
        length = hidden.shape[0]
        offset = self.arch.rope.position_offset(length, self.rotary.max_position)
        return self.rotary.cos_sin_at(torch.arange(length) + offset, hidden.dtype)

    def load_layer(self, index: int) -> LlamaDecoderLayer:
        prefix = f"model.layers.{index}"
        layer = self.model_class.decoder_layer_class(self.arch, None, prefix)
        load_weights(layer, self.tensors.items(f"{prefix}."), self.packed_modules)
        bind_no_cache(layer, self.arch)
        return layer.eval().requires_grad_(False)

    @torch.inference_mode()
    def run(self, layer: LlamaDecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [length, hidden_size], the residual added, -> the same after `layer`."""
        cos_sin = self._cos_sin(hidden)
        with set_forward_context(AttentionMetadata.single_sequence(hidden.shape[0])):
            # The layer's first norm adds its two inputs into the second, in place: hence a fresh tensor of zeros.
            out, residual = layer(hidden, torch.zeros_like(hidden), cos_sin)
        return out + residual

    @torch.inference_mode()
    def inputs_in_turn(
        self, layer: LlamaDecoderLayer, states: list[torch.Tensor]
    ) -> Iterator[tuple[str, LinearBase, Iterable[torch.Tensor]]]:
        """(name, linear, its inputs: [length, input_size] per sequence) of each linear, in the order in which they run.

        The caller may change a linear's weight before it asks for the next: what follows goes through the new one.
        In the end `states` are moved through the layer, in place. The inputs are those of the layer's own forward pass,
        which runs up to the linear for every sequence; what an earlier pass completed is not computed again.
        """
        with ComputedOnce(m for m in layer.modules() if isinstance(m, (Attention, LlamaAttention))) as once:
            for name, linear in self._linears_in_order(layer):
                yield name, linear, (self._input_of(linear, layer, hidden, once, i) for i, hidden in enumerate(states))
            for i, hidden in enumerate(states):
                once.sequence = i
                states[i] = self.run(layer, hidden)

    def _linears_in_order(self, layer: LlamaDecoderLayer) -> list[tuple[str, LinearBase]]:
        """As a pass of one token meets them."""
        met: list[tuple[str, LinearBase]] = []
        with ExitStack() as hooks:
            for name, module in layer.named_modules():
                if isinstance(module, LinearBase):
                    hook = module.register_forward_pre_hook(lambda m, _, name=name: met.append((name, m)))
                    hooks.callback(hook.remove)
            self.run(layer, torch.zeros(1, self.arch.hidden_size))
        return met

    @torch.inference_mode()
    def _input_of(
        self, linear: LinearBase, layer: LlamaDecoderLayer, hidden: torch.Tensor, once: "ComputedOnce", sequence: int
    ) -> torch.Tensor:
        """What `linear` gets to see when `layer` runs on `hidden`; the forward pass ends there."""
        once.sequence = sequence
        caught: list[torch.Tensor] = []

        def stop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            caught.append(inputs[0])
            raise _StopForward

        hook = linear.register_forward_pre_hook(stop)
        try:
            self.run(layer, hidden)
        except _StopForward:
            pass
        finally:
            hook.remove()
        return caught.pop()


class _StopForward(Exception):
    """The forward pass has come to where it was to end."""


class ComputedOnce:
    """Within it, each of `modules` computes its output once per sequence and then repeats it.

    If a forward pass stops at a linear and yet completes a module, then every linear in that module comes before, so
    its weight is final and so is the output. Set `sequence` before each pass.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.sequence: int | None = None  # None: nothing is kept
        self._modules = list(modules)
        self._outputs: dict[tuple[nn.Module, int], torch.Tensor] = {}

    def __enter__(self) -> "ComputedOnce":
        for module in self._modules:
            module.forward = partial(self._forward, module, module.forward)
        return self

    def __exit__(self, *_: object) -> None:
        self._outputs.clear()
        for module in self._modules:
            del module.forward  # the class's own is there again

    def _forward(self, module: nn.Module, forward: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        if self.sequence is None:
            return forward(*args)
        key = (module, self.sequence)
        if key not in self._outputs:
            self._outputs[key] = forward(*args)
            for inner in module.modules():  # what was kept within is not asked for any more
                if inner is not module:
                    self._outputs.pop((inner, self.sequence), None)
        return self._outputs[key]


class WholeSequenceBackend(NoCacheBackend):
    """no_cache with torch's fused kernel, which does not build the [length, length] weights.

    At a length of 1,024 these weights would cost more than the linear layers.
    """

    name = "whole_sequence"

    def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        assert metadata.num_reqs == 1  # complete from its first token, so is_causal's top left corner is the right one
        q, k, v = (t.float().transpose(0, 1)[None] for t in (query, self.key, self.value))  # [1, heads, length, size]
        group = self.spec.num_queries_per_kv
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.spec.scale)
        return out[0].transpose(0, 1).to(query.dtype).contiguous()  # [length, num_heads, head_size]


def bind_no_cache(module: nn.Module, arch: ModelArchitecture, dtype: torch.dtype = torch.float32) -> None:
    """Lets every attention layer in `module` attend within one sequence, without a KV cache."""
    spec = AttentionSpec.from_arch(arch, dtype, torch.device("cpu"), block_size=1)
    for part in module.modules():
        if isinstance(part, Attention):
            part.bind(WholeSequenceBackend(spec), torch.empty(0))
