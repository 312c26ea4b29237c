"""From files to parameters: reading safetensors tensor by tensor, and checking that every one finds its place.

Milestone: M0. vLLM counterpart: vllm/model_executor/model_loader/weight_utils.py and models/utils.py. Left out: pickled
weights (never opened), downloading (folovllm.hub).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from folovllm.model_executor.parameter import TensorMismatchError

INDEX = "model.safetensors.index.json"
_PULL_AGAIN = "the file is corrupt or its download was cut short: fetch it again"
_PICKLES = (".bin", ".pt", ".pth")


class WeightsError(ValueError):
    """The weights do not fit the model, or cannot be read; it says what was expected, found, and what to do."""


def refuse(expected: str, found: str, todo: str) -> NoReturn:
    raise WeightsError(f"expected {expected}; found {found}; to fix it: {todo}")


def safetensors_files(folder: Path) -> list[Path]:
    """The files that make up the checkpoint: the shards its index names, or all there are."""
    present = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    if not present:
        _refuse_without_safetensors(folder)
    return present


def _indexed_files(folder: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"a weight_map in {folder / INDEX}", f"{type(error).__name__}: {error}", "download that file again")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        found = f"{listing(absent)} missing in {folder}"
        refuse(f"the {len(names)} files named in {INDEX}", found, "download the missing files")
    return [folder / name for name in names]


def _refuse_without_safetensors(folder: Path) -> NoReturn:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    if not pickles:
        refuse(f"*.safetensors in {folder}", "none", "download the model's weights into the folder")
    convert = (
        "pickled weights are never opened, as unpickling can run any code; if you trust them, convert them once with "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(new_folder) of transformers"
    )
    refuse(f"*.safetensors in {folder}", f"pickled weights only ({listing(pickles)})", convert)


def iterate_weights(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor. The files are memory-mapped: one tensor at a time is in memory twice, not all."""
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
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
    """Give each checkpoint tensor to its parameter's `weight_loader`; WeightsError unless exactly all were loaded."""
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
    """Harmless leftovers: the output head of a tied model (it is the embedding), old rotary tables, biases of zeros."""
    if name.endswith(".bias"):  # early GPTQ tools gave one to every layer
        return not tensor.any()
    return (name == "lm_head.weight" and name not in targets) or name.endswith("rotary_emb.inv_freq")


def _check_complete(missing: list[str], unexpected: list[str]) -> None:
    if not missing and not unexpected:
        return
    found = [f"{len(missing)} missing ({listing(missing)})"] if missing else []
    found += [f"{len(unexpected)} unexpected ({listing(unexpected)})"] if unexpected else []
    todo = "the weights and config.json belong to different models, or a file is missing: download both again"
    if any(name.endswith(".qweight") for name in unexpected):
        todo = "these are GPTQ weights: give config.json back its 'quantization_config', or quantize_config.json"
    if missing and all(name.endswith(".g_idx") for name in missing):
        todo = (
            "without g_idx nobody knows which scale belongs to which input: write the checkpoint again with GPTQModel"
        )
    if missing == ["lm_head.weight"]:
        todo = "download the weights again; if the model ties its embeddings, config.json needs tie_word_embeddings"
    refuse("the tensors config.json describes", " and ".join(found), todo)


def listing(names: Sequence[str], limit: int = 4) -> str:
    """E.g. 'a, b, c, d and 7 more'."""
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
