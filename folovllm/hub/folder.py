"""Checks, in milliseconds, whether a folder is a model that can be loaded, from names, sizes and headers (milestone
M0).

The tensors themselves are not read: hashing half a gigabyte at every start would cost more than loading it. The check
finds the usual errors: a folder of something else, a missing tokenizer, pickled weights only, a shard that was not
downloaded, a truncated file. vLLM finds these one by one, later, as errors of the libraries it calls. Left out: tensor
names and shapes, which the model loader checks because it alone knows the architecture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from folovllm.checkpoint_files import find_checkpoint
from folovllm.hf_json import ConfigError
from folovllm.hub.errors import ModelFolderError, problem

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_HEADER = 100 * 1024 * 1024  # the limit safetensors itself has


def check_model_folder(folder: Path, tokenizer: bool = True, weights: bool = True) -> Path:
    """Returns `folder` if it has config.json, tokenizer.json and whole safetensors files.

    `tokenizer=False` and `weights=False` do without the last two. Raises `ModelFolderError` if something is missing.
    """
    names = sorted(p.name for p in folder.iterdir())
    if "config.json" not in names:
        raise _error(folder, "config.json", _listing(names), "pass the folder of a HuggingFace model")
    _read_json(folder / "config.json")
    if tokenizer:
        check_tokenizer_folder(folder)
    for name in weight_files(folder) if weights else ():
        check_safetensors(folder / name)
    return folder


def check_tokenizer_folder(folder: Path) -> Path:
    """Return `folder` if it has a tokenizer.json; else `ModelFolderError`."""
    names = sorted(p.name for p in folder.iterdir())
    if "tokenizer.json" not in names:
        raise _error(folder, "tokenizer.json", _listing(names), _tokenizer_hint(folder, names))
    return folder


def weight_files(folder: Path) -> list[str]:
    """The safetensors files that make up the model; `checkpoint_files` says which they are."""
    try:
        files = find_checkpoint(folder).files
    except ConfigError as error:
        raise ModelFolderError(f"{folder}: {error}") from None
    if files:
        return [path.name for path in files]
    names = sorted(p.name for p in folder.iterdir())
    raise _error(folder, "at least one .safetensors file", _listing(names), _weights_hint(folder, names))


def check_safetensors(path: Path) -> None:
    """Raise `ModelFolderError` unless the file is exactly as long as its own header says.

    The layout: 8 bytes N (little endian), N bytes of JSON, then the data that the JSON's offsets point into.
    """
    size = path.stat().st_size
    again = "the file is corrupt or its download was cut short: fetch it again"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER):
            raise _error(path, "a safetensors header", f"{size} bytes that hold none", again)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        raise _error(path, "a safetensors header in JSON", "something else", again) from None
    if size != 8 + length + end:
        raise _error(path, f"{8 + length + end} bytes, as its header says", f"{size} bytes", again)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _error(path, "valid JSON", str(error), "download the file again") from None
    if not isinstance(value, dict):
        raise _error(path, "a JSON object", type(value).__name__, "download the file again")
    return value


def _tokenizer_hint(folder: Path, names: list[str]) -> str:
    if any(name in names for name in ("tokenizer.model", "vocab.json")):
        load = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        return f"convert the older tokenizer files once with transformers: {load}"
    return (
        "copy tokenizer.json and tokenizer_config.json of the same model into the folder, name another folder with "
        "tokenizer=, or work on token ids with skip_tokenizer_init=True"
    )


def _weights_hint(folder: Path, names: list[str]) -> str:
    if any(name.endswith(_PICKLES) for name in names):
        out = str(folder) + "-safetensors"
        convert = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({out!r})"
        return (
            "pickled weights are never opened, because unpickling can run any code; if you trust them, convert them"
            f" once with transformers: {convert}, and copy the tokenizer files over"
        )
    if any(name.endswith(".gguf") for name in names):
        return "a GGUF is read only by 'folovllm pull'; use the model's safetensors repository"
    return "download the model's *.safetensors files into the folder"


def _listing(names: list[str]) -> str:
    if not names:
        return "an empty folder"
    shown = ", ".join(names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _error(where: Path, expected: str, found: str, todo: str) -> ModelFolderError:
    return ModelFolderError(f"{where}: " + problem(expected, found, todo))
