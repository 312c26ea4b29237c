"""A checkpoint of random weights in a public model's shape, written once to the cache for all arms.

Milestone: M4. vLLM counterpart: `load_format="dummy"`, which fills the tensors in place; here they go through a file,
so that HuggingFace loads the very same ones and tokens can be compared. The speed of a model depends on its shape and
not on what its weights say, so a machine without network can be measured on any of these. Left out: a tokenizer (the
benchmark sends token ids). Only writing loads torch and transformers.
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
from folovllm.hf_config import ModelArchitecture, parse_hf_config
from folovllm.hub.aliases import default_download_dir
from folovllm.utils import available_memory_bytes, unknown_name_message

CHECKPOINT_DTYPE = "bfloat16"  # as published; an arm that computes in another converts while it loads
VERSION = 1  # of what the tensors hold: raise it and old files are written anew
SEED = 0
INDEX = "model.safetensors.index.json"

Shape = tuple[int, ...]


# Shapes. Numbers as published; tests compare those whose config.json the project has.
_COLUMNS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "rope_theta"),
)
# fmt: off
_TABLE = {  #                     layers hidden inner  heads K/V size   vocab positions  tied   theta
    "tiny":            ("Llama",    2,    64,    128,   4,  2,  16,     512,    8_192, True,  1e4),  # made for tests
    "smollm2-135m":    ("Llama",   30,   576,  1_536,   9,  3,  64,  49_152,    8_192, True,  1e5),
    "smollm2-360m":    ("Llama",   32,   960,  2_560,  15,  5,  64,  49_152,    8_192, True,  1e5),
    "smollm2-1.7b":    ("Llama",   24, 2_048,  8_192,  32, 32,  64,  49_152,    8_192, True,  1.3e5),
    "qwen2.5-0.5b":    ("Qwen2",   24,   896,  4_864,  14,  2,  64, 151_936,   32_768, True,  1e6),
    "qwen3-0.6b":      ("Qwen3",   28, 1_024,  3_072,  16,  8, 128, 151_936,   40_960, True,  1e6),
    "qwen3-1.7b":      ("Qwen3",   28, 2_048,  6_144,  16,  8, 128, 151_936,   40_960, True,  1e6),
    "qwen3-4b":        ("Qwen3",   36, 2_560,  9_728,  32,  8, 128, 151_936,   40_960, True,  1e6),
    "qwen3-8b":        ("Qwen3",   36, 4_096, 12_288,  32,  8, 128, 151_936,   40_960, False, 1e6),
    "llama-3.2-1b":    ("Llama",   16, 2_048,  8_192,  32,  8,  64, 128_256,  131_072, True,  5e5),
    "llama-3.2-3b":    ("Llama",   28, 3_072,  8_192,  24,  8, 128, 128_256,  131_072, True,  5e5),
    "llama-3.1-8b":    ("Llama",   32, 4_096, 14_336,  32,  8, 128, 128_256,  131_072, False, 5e5),
    "mistral-7b-v0.3": ("Mistral", 32, 4_096, 14_336,  32,  8, 128,  32_768,   32_768, False, 1e6),
}
# fmt: on
_LLAMA3_FACTORS = {"llama-3.2-1b": 32.0, "llama-3.2-3b": 32.0, "llama-3.1-8b": 8.0}


def _config(name: str, family: str, *numbers: float) -> dict[str, Any]:
    """A config.json."""
    config: dict[str, Any] = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-6 if family.startswith("Qwen") else 1e-5,
        "sliding_window": None,
        **dict(zip(_COLUMNS, numbers, strict=True)),
    }
    if name in _LLAMA3_FACTORS:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": _LLAMA3_FACTORS[name],
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config


SHAPES = {name: _config(name, *row) for name, row in _TABLE.items()}


def shape_config(name: str) -> dict[str, Any]:
    """The config.json of that shape. Raises ValueError with the nearest name if there is none."""
    if name in SHAPES:
        return SHAPES[name]
    raise ValueError(unknown_name_message("shape", name.lower().rsplit("/")[-1], list(SHAPES)))


def shape_architecture(name: str) -> ModelArchitecture:
    return parse_hf_config(shape_config(name))


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
