"""Which files of a folder are the checkpoint, decided from their names; no tensor is read here.

Milestone: M0. vLLM counterpart: filter_duplicate_safetensors_files (vllm/model_executor/model_loader/weight_utils.py).
Left out: every format but safetensors.

Row 0: plain data, no torch. The hub asks before it calls a folder a model, the model loader before it reads.

    model.safetensors            the checkpoint; HuggingFace reads this file alone, whatever else is there
    model.safetensors.index.json the checkpoint is the shards that it names
    neither                      a whole set of shards (x-00001-of-00003.safetensors, ...), or the only file there is
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from folovllm.hf_json import ConfigError, read_json, refuse

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Kinds of safetensors files that are no checkpoint of their own, and what they hold.
_OTHER_KINDS = {
    "consolidated": "the same weights under Mistral's own names",
    "adapter": "a LoRA adapter, which FoloVLLM does not apply",
    "optimizer": "the state of an optimizer",
}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class CheckpointFiles:
    """What to read, and what lies beside it unread."""

    files: list[Path]
    unread: list[str]  # names of *.safetensors files that are not part of the checkpoint
    weight_map: dict[str, str] | None = None  # tensor -> file, where an index says so


def find_checkpoint(folder: Path) -> CheckpointFiles:
    """The safetensors files that make up the model in `folder`; no file if there is none.

    ConfigError if files are missing, or if it is not clear which of them are the model.
    """
    present = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    weight_map = _weight_map(folder)
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        _check_shards(folder, names, present)
    elif SINGLE in present:
        names = [SINGLE]
    else:
        names = _without_index(folder, [name for name in present if not is_other_kind(name)])
    return CheckpointFiles(
        files=[folder / name for name in names],
        unread=[name for name in present if name not in names],
        weight_map=weight_map,
    )


def is_other_kind(name: str) -> bool:
    """Whether a file of this name is no checkpoint of its own. E.g. adapter_model.safetensors."""
    return name.startswith(tuple(_OTHER_KINDS))


def describe_unread(names: Sequence[str]) -> str:
    """The files for a message. E.g. "adapter_model.safetensors (a LoRA adapter, which ...), old.safetensors"."""
    kinds = [next((text for start, text in _OTHER_KINDS.items() if name.startswith(start)), "") for name in names]
    return ", ".join(f"{name} ({kind})" if kind else name for name, kind in zip(names, kinds, strict=True))


def listing(names: Sequence[str], limit: int = 4) -> str:
    """E.g. 'a, b, c, d and 7 more'."""
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _weight_map(folder: Path) -> dict[str, str] | None:
    if not (folder / INDEX).is_file():
        return None
    again = "download that file again"
    try:
        weight_map = read_json(folder / INDEX).get("weight_map")
    except ConfigError as error:
        raise ConfigError(f"{folder / INDEX}: {error}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(f"a 'weight_map' in {folder / INDEX}", "none", again)
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            refuse(f"names of *.safetensors files in {folder / INDEX}", repr(name), again)
    return weight_map


def _check_shards(folder: Path, names: list[str], present: list[str]) -> None:
    missing = [name for name in names if name not in present]
    if missing:
        expected = f"the {len(names)} weight files named in {INDEX}"
        refuse(expected, f"{listing(missing)} missing in {folder}", "download the missing files")
    if SINGLE in present and SINGLE not in names:
        # HuggingFace would read the single file and vLLM the shards.
        found = f"{SINGLE} and an index that names {listing(names)}"
        refuse(f"one checkpoint in {folder}", found, f"move either {SINGLE} or {INDEX} and its shards away")


def _without_index(folder: Path, names: list[str]) -> list[str]:
    """The set of shards among `names`, or all of them. A tensor that two files hold is refused when they are read."""
    sets: dict[str, list[str]] = {}
    for name in names:
        match = _SHARD.fullmatch(name)
        if match:
            sets.setdefault(f"{match[1]}-of-{match[3]}", []).append(name)
    if len(sets) > 1:
        found = " and ".join(listing(shards) for shards in sets.values())
        refuse(f"one checkpoint in {folder}", found, "move the other one away, or add the index of the right one")
    for key, shards in sets.items():
        total = int(key[-5:])
        if len(shards) != total:
            have = f"{len(shards)} of them ({listing(shards)})"
            refuse(f"{total} shards in {folder}", have, "download the missing files")
        return shards
    return names
