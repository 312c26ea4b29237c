"""Building a model and filling it: `load_model` from a HuggingFace folder, `random_model` without any weights.

Milestone: M0, M9 (a rank loads its shard). vLLM counterpart: vllm/model_executor/model_loader/default_loader.py and
vllm/model_executor/model_loader/dummy_loader.py. Left out: other formats and loaders (GGUF is converted by
`folovllm pull`).

Every rank opens the whole checkpoint. The files are memory-mapped, so what a rank does not copy is not read.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from folovllm.distributed.communicator import ONE_RANK, ParallelGroups
from folovllm.gptq_config import GPTQConfig
from folovllm.hf_config import ModelArchitecture
from folovllm.model_executor.layers.linear import LinearBase, QuantizationConfig
from folovllm.model_executor.layers.quantization.gptq import GPTQQuantization
from folovllm.model_executor.layers.quantization.kernels import KernelOptions
from folovllm.model_executor.layers.quantization.packing import Packing
from folovllm.model_executor.layers.quantization.quantized_linear import LEAVES, dequantize_weights, settle_g_idx
from folovllm.model_executor.layers.quantization.select import choose_kernel
from folovllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.model_executor.models.registry import get_model_class
from folovllm.model_executor.weight_utils import WeightsError, iterate_weights, read_tensor, safetensors_files
from folovllm.parallel import WHOLE_MODEL, ModelShard
from folovllm.parts import load_part

logger = logging.getLogger(__name__)

Weights = Iterable[tuple[str, torch.Tensor]]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LAYERS = "model.layers."
_COMPARED_ROWS = 8192  # of head and embedding at once: two models' vocabularies side by side would take gigabytes


def load_model(
    folder: Path,
    arch: ModelArchitecture,
    dtype: torch.dtype,
    device: torch.device,
    quant_config: QuantizationConfig | None = None,
    linear_backend: str = "torch",
    quantization: str = "dequantize",
    gptq_kernel: str = "auto",
    gptq_runtime: str = "auto",
    huge_pages: bool = False,
    cpu_isa: str = "native",
    max_model_len: int | None = None,
    parts: Mapping[str, str] | None = None,
    groups: ParallelGroups = ONE_RANK,
) -> LlamaForCausalLM:
    """The model of `folder` with its weights, in `dtype` on `device`, as the model file says it: nothing is replaced
    yet (model_executor/cpu/accelerate.py). Raises WeightsError, which says what is wrong.

    The next three matter to a GPTQ checkpoint. With `quantization="auto"` its weights stay packed if something here
    can multiply with them; with "dequantize" plain ones are loaded. `gptq_kernel` and `gptq_runtime` say how packed
    weights are multiplied and what is kept for that (config.py); `gptq_kernel="auto"` takes a fast kernel only with
    `linear_backend="auto"`. The rotary table is built for `max_model_len` positions; with None it is built, whole, at
    the first lookup. Of `parts` (parts.py) it uses quantize.packing. `groups` says which part of the model is built.
    """
    files = safetensors_files(folder)  # before building: a wrong folder should fail at once
    arch, weights = settle_head(arch, files, dtype)
    weights = ((name, tensor) for name, tensor in weights if not of_another_stage(name, arch, groups.shard))
    if arch.quantization is not None:
        packing: type[Packing] = load_part("quantize.packing", parts)
        if quant_config is None:
            options = KernelOptions(dtype, device.type, gptq_runtime, huge_pages, packing, cpu_isa)
            quant_config = packed_quantization(arch, options, quantization, gptq_kernel, linear_backend)
        if quant_config is None:
            weights = dequantize_weights(weights, arch.quantization, packing)
        else:
            weights = settle_g_idx(weights, arch.quantization)
    try:
        model = _build(arch, dtype, device, quant_config, groups)
        if isinstance(quant_config, GPTQQuantization):
            quant_config.plan(model, groups.shard.tp_size * groups.shard.pp_size)
        model.load_weights(weights)
    except WeightsError as error:
        raise WeightsError(f"{folder}: {error}") from None
    return _finish(model, dtype, device, quant_config, max_model_len)


def of_another_stage(name: str, arch: ModelArchitecture, shard: ModelShard) -> bool:
    """Whether the tensor `name` belongs to a stage that `shard` is not in. A name that no stage has is not skipped:
    `load_weights` refuses it."""
    if name.startswith(_LAYERS):
        number = name.removeprefix(_LAYERS).partition(".")[0]
        in_model = number.isdecimal() and int(number) < arch.num_hidden_layers
        return in_model and int(number) not in shard.layers(arch.num_hidden_layers)
    if name.startswith(("lm_head.", "model.norm.")):
        return not shard.is_last_stage
    is_head = arch.tie_word_embeddings and shard.is_last_stage
    return name == EMBEDDING and not shard.is_first_stage and not is_head


def settle_head(
    arch: ModelArchitecture, files: list[Path], dtype: torch.dtype
) -> tuple[ModelArchitecture, Iterator[tuple[str, torch.Tensor]]]:
    """What a checkpoint with tied embeddings really holds: the architecture to build, and the weights to load.

    A head equal to the embedding is the embedding. A head of its own was trained, whatever config.json says, so it is
    loaded and the model is built untied, as transformers 5 does. A head without an embedding is both.
    """
    weights = iterate_weights(files)
    head = read_tensor(files, HEAD) if arch.tie_word_embeddings else None
    if head is None:
        return arch, weights
    embedding = read_tensor(files, EMBEDDING)
    if embedding is None:
        return arch, ((EMBEDDING if name == HEAD else name, tensor) for name, tensor in weights)
    if _same(head, embedding, dtype):
        return arch, ((name, tensor) for name, tensor in weights if name != HEAD)
    logger.warning(
        "%s: config.json says tie_word_embeddings, but the %s in the checkpoint is not %s: loaded as its own head",
        files[0].parent,
        HEAD,
        EMBEDDING,
    )
    return dataclasses.replace(arch, tie_word_embeddings=False), weights


def _same(first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two weights, both [vocab_size, hidden_size], are equal in the dtype that the model will have."""
    if first.shape != second.shape:
        return False
    pairs = zip(first.split(_COMPARED_ROWS), second.split(_COMPARED_ROWS), strict=True)
    return all(torch.equal(a.to(dtype), b.to(dtype)) for a, b in pairs)


def packed_quantization(
    arch: ModelArchitecture, options: KernelOptions, quantization: str, kernel: str, linear_backend: str
) -> GPTQQuantization | None:
    """What multiplies with the packed weights of a model, or None if the model is to have plain ones."""
    if arch.quantization is None or quantization != "auto":
        return None
    return gptq_quantization(arch.quantization, options, kernel, linear_backend)


def gptq_quantization(
    config: GPTQConfig, options: KernelOptions, kernel: str, linear_backend: str
) -> GPTQQuantization | None:
    """With the kernel called `kernel`; "auto" takes the best one here, or returns None if plain weights are better."""
    name = choose_kernel(config, options, linear_backend) if kernel == "auto" else kernel
    return None if name is None else GPTQQuantization(config, name, options)


def random_model(
    arch: ModelArchitecture,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    quant_config: QuantizationConfig | None = None,
    max_model_len: int | None = None,
    groups: ParallelGroups = ONE_RANK,
) -> LlamaForCausalLM:
    """A model of this shape with random weights, the same for the same seed: its speed is real, its text is not.

    Norm weights are 1, matrices have a standard deviation of 1 / sqrt(inputs), so activations keep their size. Several
    ranks have the shards of the model that one rank would have. Packed weights of a GPTQ model have random levels, for
    one rank only.
    """
    if isinstance(quant_config, GPTQQuantization) and groups.shard != WHOLE_MODEL:
        raise ValueError(
            "load_format='dummy' makes packed weights for one rank only; use quantization='dequantize', or "
            "tensor_parallel_size=1 and pipeline_parallel_size=1"
        )
    model = _build(arch, dtype, device, quant_config, groups)
    generator = torch.Generator(device).manual_seed(seed)
    if isinstance(quant_config, GPTQQuantization):
        quant_config.plan(model)
        quant_config.randomise(model, generator)
    if groups.shard == WHOLE_MODEL:
        for name, param in model.named_parameters():
            if name.rpartition(".")[2] not in LEAVES:
                _randomise(name, param.data, generator)
    else:
        _load_random_shards(model, _build(arch, dtype, torch.device("meta"), quant_config), device, generator)
    return _finish(model, dtype, device, quant_config, max_model_len)


def _randomise(name: str, values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return values.fill_(1.0)
    return values.normal_(0.0, values.shape[-1] ** -0.5, generator=generator)


def _load_random_shards(
    model: LlamaForCausalLM, whole: LlamaForCausalLM, device: torch.device, generator: torch.Generator
) -> None:
    """Draws the parameters of `whole`, which has shapes but no memory, one by one, and loads their shards into `model`.

    Each rank also draws what it does not have, because the numbers of a generator depend on how many came before.
    """
    own = dict(model.named_parameters())
    for name, param in whole.named_parameters():
        values = _randomise(name, torch.empty(param.shape, dtype=param.dtype, device=device), generator)
        if name not in own:
            continue
        module = whole.get_submodule(name.rpartition(".")[0])
        parts = module.output_parts() if isinstance(module, LinearBase) else {None: len(values)}
        for shard_id, part in zip(parts, values.split(list(parts.values())), strict=True):
            own[name].weight_loader(own[name], part, shard_id)  # type: ignore[attr-defined]


def _build(
    arch: ModelArchitecture,
    dtype: torch.dtype,
    device: torch.device,
    quant_config: QuantizationConfig | None,
    groups: ParallelGroups = ONE_RANK,
) -> LlamaForCausalLM:
    with device, _default_dtype(dtype):  # parameters come up empty, in their final place and type
        return get_model_class(arch.architecture)(arch, quant_config, groups)


def _finish(
    model: LlamaForCausalLM,
    dtype: torch.dtype,
    device: torch.device,
    quant_config: QuantizationConfig | None,
    max_model_len: int | None,
) -> LlamaForCausalLM:
    for module in model.modules():
        if isinstance(module, LinearBase):
            module.quant_method.process_weights_after_loading(module)
        if isinstance(module, RotaryEmbedding) and max_model_len is not None:
            module.build(max_model_len, dtype, device)
    if isinstance(quant_config, GPTQQuantization):
        quant_config.finish(model)
    return model.eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
