"""A checkpoint of random weights in a public model's shape, written once to the cache for all arms.

Milestone: M4. vLLM counterpart: `load_format="dummy"` (vllm/model_executor/model_loader/dummy_loader.py), which fills
the tensors in place; here they go through a file, so that HuggingFace loads the very same ones and tokens can be
compared. The speed of a model depends on its shape and not on what its weights say, so a machine without network can be
measured on any of these. Left out: a tokenizer (the benchmark sends token ids). Only writing loads torch and
transformers.
"""

import json
import re
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

from folovllm.config import DTYPE_BYTES
from folovllm.core.kv_cache_utils import GIB
from folovllm.hub.aliases import default_download_dir
from folovllm.model_shapes import shape_architecture, shape_config
from folovllm.utils import available_memory_bytes

CHECKPOINT_DTYPE = "bfloat16"  # as published; an arm that computes in another converts while it loads
VERSION = 1  # of what the tensors hold: raise it and old files are written anew
SEED = 0
INDEX = "model.safetensors.index.json"

Shape = tuple[int, ...]


def checkpoint_folder(shape: str, root: Path | None = None) -> Path:
    """Where the checkpoint of that shape is, or will be. Raises ValueError if there is no such shape."""
    shape_config(shape)
    return (root or default_download_dir()) / "random" / f"{shape}-v{VERSION}"


def is_written(folder: Path) -> bool:
    return (folder / INDEX).is_file()  # the folder appears under its name when it is complete


def check_room(shape: str, folder: Path, device: str, dtype: str) -> None:
    """Raises ValueError if the weights do not fit: on the disk while they are not written; on a CPU, in the memory."""
    parent = next(parent for parent in folder.parents if parent.exists())
    rooms = [("the disk", CHECKPOINT_DTYPE, shutil.disk_usage(parent).free)] if not is_written(folder) else []
    rooms += [("memory", dtype, available_memory_bytes())] if device == "cpu" else []
    for room, stored_as, free in rooms:
        needed = shape_architecture(shape).num_parameters() * DTYPE_BYTES[stored_as]
        if needed > free:
            raise ValueError(
                f"--random-weights {shape}: its weights take {needed / GIB:.1f} GiB in {stored_as}, {free / GIB:.1f} "
                f"GiB of {room} are free; take a smaller shape"
            )


def write_checkpoint(shape: str, folder: Path) -> None:
    """Write config.json and one safetensors file per layer to `folder`, unless they are there."""
    if is_written(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        staging = Path(scratch, folder.name)
        _write(shape, staging)
        shutil.rmtree(folder, ignore_errors=True)  # a leftover without index
        staging.rename(folder)


def _write(shape: str, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape_config(shape), indent=1))
    weight_map: dict[str, str] = {}
    for file_name, shapes in _shards(folder).items():
        data = {name: random_tensor(name, size) for name, size in shapes.items()}
        save_file(data, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file_name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def random_tensor(name: str, shape: Shape) -> Any:
    """The tensor of that name, bf16 of `shape`: norms are 1, matrices keep the size of activations, biases are small.

    Its seed is its name: it does not depend on which tensors were made before.
    """
    import torch

    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
    scale = 0.02 if name.endswith(".bias") else shape[-1] ** -0.5
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, scale, generator=generator)


def _shards(folder: Path) -> dict[str, dict[str, Shape]]:
    """File name -> tensor name -> shape, as in transformers' model of `folder`/config.json: a file per layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shards: dict[str, dict[str, Shape]] = {}
    for name, tensor in model.named_parameters():  # a tied head is not among them
        layer = re.search(r"\.layers\.(\d+)\.", name)
        part = f"layer-{int(layer[1]):03}" if layer else "ends"
        shards.setdefault(f"model-{part}.safetensors", {})[name] = tuple(tensor.shape)
    return shards
