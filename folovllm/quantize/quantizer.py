"""The quantisation job: a plain checkpoint in, a GPTQ checkpoint out, one decoder layer at a time.

Milestone: M7. vLLM counterpart: none. Left out: several GPUs, quantising the head or the embedding.

The calibration sequences pass through the layers that are already quantised, so each layer is fitted to the inputs that
it will really get. The same holds within a layer: first qkv, then o, then gate and up, then down. Memory holds one
layer, one Hessian, and the hidden states of the sequences, twice. Finished layers are on disk, and an interrupted job
continues after them.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from folovllm.gptq_config import GPTQConfig
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.quantization.packing import Packing
from folovllm.model_executor.layers.quantization.quantized_linear import LEAVES, QuantizedLinear, dequantize_weights
from folovllm.model_executor.models.llama import LlamaDecoderLayer
from folovllm.model_executor.weight_utils import load_weights
from folovllm.parts import check_parts, load_part
from folovllm.quantize.clock import ERRORS, FILES, FORWARD, HESSIAN
from folovllm.quantize.gptq import GPTQ, Hessian, output_error, rtn_quantize
from folovllm.quantize.grid import Grid
from folovllm.quantize.layerwise import LayerRunner, TensorFolder
from folovllm.quantize.output import LayerErrors, OutputFolder, digest_of

METHODS = ("gptq", "rtn")
_POSSIBLE_GROUPS = (32, 64, 128)  # what `folovllm quantize` takes
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class QuantizeSettings:
    """The settings of a job.

    `damp` is the share of the Hessian's mean diagonal that is added to its diagonal. `parts` are classes of one's own
    for quantize.grid, quantize.gptq and quantize.packing (parts.py).
    """

    config: GPTQConfig
    method: str = "gptq"
    damp: float = 0.01
    static_groups: bool = False
    parts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_parts(self.parts)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if not 0.0 <= self.damp <= 1.0:
            raise ValueError(f"damp must be between 0 and 1, such as 0.01; got {self.damp}")
        if self.method == "rtn" and self.config.desc_act:
            raise ValueError("act-order orders GPTQ's columns; rounding to nearest has no order: drop --desc-act")
        if self.method == "rtn" and self.static_groups:
            raise ValueError("rounding to nearest never changes a group's grid: drop --static-groups")

    def to_json(self) -> dict[str, Any]:
        """Without parts of one's own it is what earlier versions wrote, so that their unfinished jobs can go on."""
        return {name: value for name, value in asdict(self).items() if name != "parts" or value}


def quantize_checkpoint(
    source: Path,
    out: Path,
    settings: QuantizeSettings,
    windows: Sequence[Sequence[int]] = (),
    progress: bool = True,
) -> list[LayerErrors]:
    """Writes the quantised checkpoint of folder `source` to folder `out`, and returns the errors of the layers it made.

    `windows` are the token ids of the calibration sequences. If an earlier call with the same settings was interrupted,
    this call continues it. Raises ValueError for sizes that cannot be divided into groups, for a quantised source, or
    if `out` holds something else.
    """
    arch = load_hf_config(source)
    check_sizes(arch, settings.config)
    if arch.quantization is not None:
        raise ValueError(f"{source} is quantised already: quantise the model it was made from")
    if settings.method == "gptq" and not windows:
        raise ValueError("GPTQ needs calibration sequences; only method='rtn' does without")
    output = OutputFolder(source, out, settings.to_json() | {"calibration": digest_of(windows)}, arch)
    job = QuantizeJob(TensorFolder(source), output, arch, settings)
    errors = job.run(windows, progress)
    output.finish(settings.config, settings.damp, settings.static_groups)
    return errors


class QuantizeJob:
    """The loop over the decoder layers."""

    def __init__(
        self, tensors: TensorFolder, output: OutputFolder, arch: ModelArchitecture, settings: QuantizeSettings
    ) -> None:
        self.tensors, self.output, self.settings, self.config = tensors, output, settings, settings.config
        self.num_layers = arch.num_hidden_layers
        self.runner, self.clock = LayerRunner(tensors, arch), output.clock
        self.packed_modules = self.runner.packed_modules
        self.grid: type[Grid] = load_part("quantize.grid", settings.parts)
        self.packing: type[Packing] = load_part("quantize.packing", settings.parts)
        self.gptq: GPTQ = load_part("quantize.gptq", settings.parts)(
            self.config, settings.damp, static_groups=settings.static_groups, grid=self.grid, clock=self.clock
        )

    @torch.inference_mode()
    def run(self, windows: Sequence[Sequence[int]], progress: bool) -> list[LayerErrors]:
        states = self.runner.embed(windows) if self.settings.method == "gptq" else []
        bar = tqdm(total=4 * self.num_layers, unit="linear", desc=self.settings.method, disable=not progress)
        with bar:
            for index in range(self.num_layers):
                self._do_layer(index, states, bar)
        return self.output.errors

    def _do_layer(self, index: int, states: list[torch.Tensor], bar: "tqdm[Any]") -> None:
        """Quantises a layer, or takes it from the output folder, and moves `states` through it, in place."""
        with self.clock.part(FILES):
            layer = self.runner.load_layer(index)
        if self.output.has_layer(index):
            self._reload(layer, index)
            bar.update(4)
            with self.clock.part(FORWARD):
                states[:] = [self.runner.run(layer, hidden) for hidden in states]
        else:
            self._quantize_layer(layer, index, states, bar)
        # A parameter refers to its layer through its weight_loader. Without this, the cycle would keep the layer alive.
        for param in layer.parameters():
            delattr(param, "weight_loader")

    def _reload(self, layer: LlamaDecoderLayer, index: int) -> None:
        """Fills `layer` with what an earlier call made of it."""
        prefix = f"model.layers.{index}."
        stored = self.output.layer_tensors(index)
        plain = dequantize_weights(
            ((name.removeprefix(prefix), t) for name, t in stored.items()), self.config, self.packing
        )
        load_weights(layer, plain, self.packed_modules)

    def _quantize_layer(
        self, layer: LlamaDecoderLayer, index: int, states: list[torch.Tensor], bar: "tqdm[Any]"
    ) -> None:
        prefix = f"model.layers.{index}."
        tensors = dict(self.tensors.items(prefix))  # norms and biases stay as they are
        errors: list[LayerErrors] = []
        start = time.perf_counter()
        for name, linear, inputs in self.clock.each(FORWARD, self.runner.inputs_in_turn(layer, states)):
            quantized, error, rtn_error = self._quantize_linear(linear, inputs)
            # The next linear is fitted to the outputs of this quantised one, as when the model runs.
            linear.weight.data.copy_(quantized.dequantize())  # type: ignore[operator]
            tensors |= self._packed(name, linear, quantized, tensors)
            errors.append(LayerErrors(index, name, error, rtn_error, time.perf_counter() - start))
            start = time.perf_counter()
            bar.update()
            bar.set_postfix_str(errors[-1].summary())
        self.output.add_layer(index, {prefix + name: tensor for name, tensor in tensors.items()}, errors)

    def _quantize_linear(
        self, linear: LinearBase, inputs: Iterable[torch.Tensor]
    ) -> tuple[QuantizedLinear, float | None, float | None]:
        """Quantises a fused layer at once: its parts share their inputs, and rows do not depend on each other."""
        weight = linear.weight.detach().clone()  # type: ignore[operator]
        if self.settings.method == "rtn":
            return rtn_quantize(weight, self.config, self.grid), None, None
        hessian = Hessian(linear.input_size)
        for x in self.clock.each(FORWARD, inputs):
            with self.clock.part(HESSIAN):
                hessian.add(x)
        quantized = self.gptq.quantize(weight, hessian.matrix)
        with self.clock.part(ERRORS):
            nearest = rtn_quantize(weight, self.config, self.grid)
            errors = [output_error(weight, q.dequantize(), hessian.matrix) for q in (quantized, nearest)]
        return quantized, errors[0], errors[1]

    def _packed(self, name: str, linear: LinearBase, quantized: QuantizedLinear, tensors: Tensors) -> Tensors:
        """Returns the packed tensors of each checkpoint layer in `linear`, and removes their plain weights from
        `tensors`.
        """
        parent, _, last = name.rpartition(".")
        names = {shard_id: part for part, shard_id in self.packed_modules.get(last, [(last, None)])}
        packed: Tensors = {}
        start = 0
        for shard_id, size in linear.output_parts().items():
            full = f"{parent}.{names[shard_id]}"
            del tensors[f"{full}.weight"]
            leaves = quantized.outputs(start, size).pack(self.config, self.packing)
            packed |= {f"{full}.{leaf}": leaves[leaf] for leaf in LEAVES}
            start += size
        return packed


def check_sizes(arch: ModelArchitecture, config: GPTQConfig) -> None:
    """Raises ValueError unless groups divide every input size and every size fills whole words."""
    inputs = {arch.hidden_size, arch.q_size, arch.intermediate_size}
    if any(size % config.group_length(size) for size in inputs):
        fitting = [str(g) for g in _POSSIBLE_GROUPS if all(size % g == 0 for size in inputs)]
        sizes = ", ".join(map(str, sorted(inputs)))
        raise ValueError(
            f"group_size={config.group_size} does not divide all input sizes of this model ({sizes}); "
            f"use {', '.join([*fitting, '-1'])} (-1: one group per output)"
        )
    odd = sorted(size for size in inputs | {arch.kv_size} if size % config.pack_unit)
    if odd:
        raise ValueError(
            f"{config.bits} bits are packed {config.pack_unit} values at a time, and this model has sizes that are no "
            f"multiples of it ({', '.join(map(str, odd))}); use another number of bits"
        )
