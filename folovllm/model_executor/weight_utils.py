"""From files to parameters: reading safetensors tensor by tensor, and checking that every one finds its place.

Milestone: M0. vLLM counterpart: vllm/model_executor/model_loader/weight_utils.py and
vllm/model_executor/models/utils.py. Left out: pickled weights (never opened), downloading (folovllm.hub).

Nothing is loaded or left out silently: a tensor without a place, a place without a tensor, a tensor in two files, and a
tensor that its index looks for elsewhere are refused by name. Files beside the checkpoint are named in a warning.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from folovllm.checkpoint_files import INDEX, CheckpointFiles, describe_unread, find_checkpoint, listing
from folovllm.hf_json import ConfigError
from folovllm.model_executor.parameter import TensorMismatchError

logger = logging.getLogger(__name__)

_PULL_AGAIN = "the file is corrupt or its download was cut short: fetch it again"
_PICKLES = (".bin", ".pt", ".pth")


class WeightsError(ValueError):
    """The weights do not fit the model, or cannot be read; it says what was expected, found, and what to do."""


def refuse(expected: str, found: str, todo: str) -> NoReturn:
    raise WeightsError(f"expected {expected}; found {found}; to fix it: {todo}")


def safetensors_files(folder: Path) -> list[Path]:
    """The files that make up the checkpoint. A warning names the safetensors files that are left unread."""
    try:
        checkpoint = find_checkpoint(folder)
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    if not checkpoint.files:
        _refuse_without_safetensors(folder)
    if checkpoint.weight_map is not None:
        _check_index(checkpoint, checkpoint.weight_map)
    if checkpoint.unread:
        read = listing([path.name for path in checkpoint.files])
        logger.warning("%s: read %s; not read: %s", folder, read, describe_unread(checkpoint.unread))
    return checkpoint.files


def _check_index(checkpoint: CheckpointFiles, weight_map: Mapping[str, str]) -> None:
    """Every tensor must be where the index says it is: readers that trust the index would miss it."""
    held = {path.name: set(_tensor_names(path)) for path in checkpoint.files}
    absent = [name for name, file in weight_map.items() if name not in held[file]]
    if absent:
        file = checkpoint.files[0].parent / weight_map[absent[0]]
        found = f"{file} without {listing([name for name in absent if weight_map[name] == file.name])}"
        refuse(f"every tensor in the file that {INDEX} names", found, "download the index and the weights again")


def _refuse_without_safetensors(folder: Path) -> NoReturn:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        todo = "download the model's own safetensors files into the folder"
        refuse(f"the weights of a model in {folder}", describe_unread(others), todo)
    if not pickles:
        refuse(f"*.safetensors in {folder}", "none", "download the model's weights into the folder")
    convert = (
        "pickled weights are never opened, as unpickling can run any code; if you trust them, convert them once with "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(new_folder) of transformers"
    )
    refuse(f"*.safetensors in {folder}", f"pickled weights only ({listing(pickles)})", convert)


def iterate_weights(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor. The files are memory-mapped: one tensor at a time is in memory twice, not all.

    WeightsError if two files hold a tensor of the same name, as there is no telling which of them is meant.
    """
    files = list(files)
    locate_tensors(files)
    for path in files:
        yield from _tensors(path)


def locate_tensors(files: Iterable[Path]) -> dict[str, Path]:
    """Which file holds each tensor; WeightsError if two files hold one of the same name."""
    holder: dict[str, Path] = {}
    for path in files:
        for name in _tensor_names(path):
            if name in holder:
                found = f"it in {holder[name].name} and in {path.name}"
                refuse(f"tensor {name!r} in one file of {path.parent}", found, "move the file that is too many away")
            holder[name] = path
    return holder


def read_tensor(files: Iterable[Path], name: str) -> torch.Tensor | None:
    """The tensor called `name`, or None if no file holds it."""
    path = locate_tensors(files).get(name)
    return None if path is None else next(tensor for _, tensor in _tensors(path, [name]))


def _tensor_names(path: Path) -> list[str]:
    """From the file's header alone."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        _refuse_file(path, error)


def _tensors(path: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys() if names is None else names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        _refuse_file(path, error)


def _refuse_file(path: Path, error: Exception) -> NoReturn:
    refuse("a whole safetensors file", f"{path} of {path.stat().st_size:,} bytes ({error})", _PULL_AGAIN)


Target = tuple[nn.Parameter, Any]  # a parameter, and which shard of it


def checkpoint_targets(model: nn.Module, packed: Mapping[str, Sequence[tuple[str, Any]]]) -> dict[str, Target]:
    """Every tensor name the checkpoint must have -> where it goes.

    E.g. our "layers.0.self_attn.qkv_proj.weight" gives "layers.0.self_attn.q_proj.weight" -> (param, "q"), and k, v.
    """
    targets: dict[str, Target] = {}
    for name, param in model.named_parameters():  # a tied lm_head appears once, as the embedding
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        for part, shard_id in packed.get(last, [(last, None)]):
            targets[".".join(filter(None, (parent, part, leaf)))] = (param, shard_id)
    return targets


def load_weights(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], packed: Mapping[str, Sequence[tuple[str, Any]]]
) -> None:
    """Give each checkpoint tensor to its parameter's `weight_loader`.

    WeightsError if a tensor has no place in the model, or if a place stays empty.
    """
    targets = checkpoint_targets(model, packed)
    missing, unexpected = dict.fromkeys(targets), []  # a dict, as a set that keeps the model's order
    for name, tensor in weights:
        if name in targets:
            _load_one(name, tensor, *targets[name])
            missing.pop(name, None)
        elif not _ignorable(name, tensor, targets):
            unexpected.append(name)
    _check_complete(list(missing), unexpected)


def _load_one(name: str, tensor: torch.Tensor, param: nn.Parameter, shard_id: Any) -> None:
    try:
        param.weight_loader(param, tensor, shard_id)  # type: ignore[attr-defined]
    except TensorMismatchError as error:
        todo = "the weights and config.json belong to different models: download both again"
        raise WeightsError(f"tensor {name!r}: {error}; to fix it: {todo}") from None


def _ignorable(name: str, tensor: torch.Tensor, targets: Mapping[str, Target]) -> bool:
    """Leftovers that change nothing: rotary tables of old transformers versions, and biases of zeros.

    Early GPTQ tools gave such a bias to every layer.
    """
    layer, _, leaf = name.rpartition(".")
    if leaf == "bias" and (f"{layer}.weight" in targets or f"{layer}.qweight" in targets):
        return not tensor.any()
    return name.endswith(".rotary_emb.inv_freq")


def _check_complete(missing: list[str], unexpected: list[str]) -> None:
    if not missing and not unexpected:
        return
    found = [f"{len(missing)} missing ({listing(missing)})"] if missing else []
    found += [f"{len(unexpected)} unexpected ({listing(unexpected)})"] if unexpected else []
    todo = "the weights and config.json belong to different models, or a file is missing: download both again"
    if any(name.endswith(".qweight") for name in unexpected):
        todo = "these are GPTQ weights: give config.json back its 'quantization_config', or quantize_config.json"
    if not missing and all(name.endswith(".bias") for name in unexpected):
        todo = "set the bias in config.json (e.g. 'attention_bias': true); hf_config.parse_hf_config must read that key"
    if missing and all(name.endswith(".g_idx") for name in missing):
        todo = "under desc_act g_idx alone says which scale an input has: write the checkpoint again with GPTQModel"
    if missing == ["lm_head.weight"]:
        todo = "download the weights again; if the model ties its embeddings, config.json needs tie_word_embeddings"
    refuse("the tensors config.json describes", " and ".join(found), todo)
