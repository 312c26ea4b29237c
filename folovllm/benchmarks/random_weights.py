"""A checkpoint of random weights in a public model's shape, written once to the cache for all arms.

Milestone: M4. vLLM counterpart: vllm/model_executor/model_loader/dummy_loader.py, which fills the tensors in place;
here they go through a file, so that HuggingFace loads the very same ones and tokens can be compared. Left out: a
tokenizer (the benchmark sends token ids).

The parent process uses only `checkpoint_folder` and `check_room`, and torch stays away from it.
"""

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from folovllm.benchmarks.shapes import shape_architecture, shape_config
from folovllm.config import DTYPE_BYTES
from folovllm.hf_config import ModelArchitecture
from folovllm.hub.aliases import default_download_dir

CHECKPOINT_DTYPE = "bfloat16"  # as published; an arm that computes in another converts while it loads
VERSION = 1  # of what the tensors hold: raise it and old files are written anew
SEED = 0
INDEX = "model.safetensors.index.json"
GIB = 2**30

Shape = tuple[int, ...]


def checkpoint_folder(shape: str, root: Path | None = None) -> Path:
    """Where the checkpoint of that shape is, or will be. ValueError if there is no such shape."""
    shape_config(shape)
    return (root or default_download_dir()) / "random" / f"{shape}-v{VERSION}"


def is_written(folder: Path) -> bool:
    return (folder / INDEX).is_file()  # the folder appears under its name when it is complete


def check_room(shape: str, folder: Path, device: str, dtype: str) -> None:
    """ValueError if the disk (while it is not written) or, on a CPU, the memory is too small for the weights."""
    num_parameters = shape_architecture(shape).num_parameters()
    existing = next(parent for parent in folder.parents if parent.exists())
    needed, free = num_parameters * DTYPE_BYTES[CHECKPOINT_DTYPE], shutil.disk_usage(existing).free
    if not is_written(folder) and needed > free:
        raise ValueError(
            f"--random-weights {shape}: its checkpoint takes {needed / GIB:.1f} GiB, the disk of the cache has "
            f"{free / GIB:.1f} GiB left; free some or take a smaller shape"
        )
    needed, free = num_parameters * DTYPE_BYTES[dtype], psutil.virtual_memory().available
    if device == "cpu" and needed > free:
        raise ValueError(
            f"--random-weights {shape}: its weights take {needed / GIB:.1f} GiB in {dtype}, {free / GIB:.1f} GiB of "
            f"memory are free; take a smaller shape"
        )


def write_checkpoint(shape: str, folder: Path) -> None:
    """Write config.json and one safetensors file per layer to `folder`, unless they are there."""
    if is_written(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(shape, staging)
        shutil.rmtree(folder, ignore_errors=True)  # a leftover without index
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(shape: str, folder: Path) -> None:
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    for file_name, tensors in _shards(shape_architecture(shape)):
        data = {name: random_tensor(name, size) for name, size in tensors.items()}
        save_file(data, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    (folder / "config.json").write_text(json.dumps(shape_config(shape), indent=1))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_tensor(name: str, shape: Shape) -> Any:
    """The tensor of that name, bf16 of `shape`: norms are 1, matrices keep the size of activations, biases are small.

    Seeded by its name: it does not depend on which tensors were made before.
    """
    import torch

    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
    scale = 0.02 if name.endswith(".bias") else shape[-1] ** -0.5
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, scale, generator=generator)


def _shards(arch: ModelArchitecture) -> Iterator[tuple[str, dict[str, Shape]]]:
    """(file name, tensor name -> shape): the ends of the model first, then layer by layer."""
    embedding = (arch.vocab_size, arch.hidden_size)
    ends = {"model.embed_tokens.weight": embedding, "model.norm.weight": (arch.hidden_size,)}
    if not arch.tie_word_embeddings:
        ends["lm_head.weight"] = embedding
    yield "model-ends.safetensors", ends
    for layer in range(arch.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield f"model-layer-{layer:03}.safetensors", {prefix + k: v for k, v in _layer(arch).items()}


def _layer(arch: ModelArchitecture) -> dict[str, Shape]:
    hidden, inner, q, kv = arch.hidden_size, arch.intermediate_size, arch.q_size, arch.kv_size
    tensors: dict[str, Shape] = {
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if arch.qkv_bias:
        sizes = {"q": q, "k": kv, "v": kv}
        tensors |= {f"self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
    if arch.qk_norm:
        tensors |= {f"self_attn.{name}_norm.weight": (arch.head_dim,) for name in ("q", "k")}
    return tensors
