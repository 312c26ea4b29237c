"""The folder of a quantised checkpoint while it is being written: a file per finished layer, and config.json last.

Milestone: M7. vLLM counterpart: none. Left out: merging the files, because loaders read the index.

    quantize_log.json                     settings, finished layers, time and memory; a later run continues from here
    model-00001-of-00032.safetensors      embedding, final norm, head, unchanged
    model-00002-of-00032.safetensors      layer 0, and so on
    config.json, model.safetensors.index.json, tokenizer: written at the end, so no loader accepts half a model

A file is written under another name and then renamed, so under its own name it is always complete.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from folovllm.checkpoint_files import INDEX
from folovllm.gptq_config import GPTQConfig
from folovllm.hf_config import ModelArchitecture
from folovllm.quantize.clock import FILES, PartClock
from folovllm.quantize.layerwise import TensorFolder
from folovllm.utils import peak_memory_bytes

LOG = "quantize_log.json"
QUANTIZER = "folovllm"
# Everything besides the weights that belongs to a model folder: tokenizer, chat template, generation_config.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def copy_chat_templates(source: Path, out: Path) -> None:
    """Copy the folder of named chat templates, the only folder of a model that belongs to a checkpoint."""
    folder = source / "additional_chat_templates"
    if folder.is_dir():
        shutil.copytree(folder, out / folder.name, dirs_exist_ok=True)


@dataclass(frozen=True)
class LayerErrors:
    """How much rounding one linear layer disturbs its outputs (see `output_error`). None where it was not measured."""

    layer: int
    linear: str
    error: float | None
    rtn_error: float | None
    seconds: float

    def summary(self) -> str:
        """E.g. "layer 3 mlp.down_proj: GPTQ 1.1e-03, RTN 3.9e-03"."""
        name = f"layer {self.layer} {self.linear}"
        if self.error is None:
            return name
        return f"{name}: GPTQ {self.error:.1e}, RTN {self.rtn_error:.1e}"


class OutputFolder:
    """A folder opened for one set of settings. Raises ValueError if the folder holds anything else."""

    def __init__(self, source: Path, out: Path, settings: dict[str, Any], arch: ModelArchitecture) -> None:
        self.source, self.out, self.num_layers = source, out, arch.num_hidden_layers
        self.settings = settings | {"source": _source_digest(source)}
        self.errors: list[LayerErrors] = []
        self.clock, self.started = PartClock(), time.perf_counter()
        self.seconds_before, self.peak_before = 0.0, 0
        if (out / LOG).is_file():
            self._resume()
        elif out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file: name a new folder")
        elif out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty: name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        self._write_log()

    def _resume(self) -> None:
        log = _read_log(self.out)
        if (self.out / "config.json").is_file():
            raise ValueError(f"{self.out} holds a finished model: name a new folder")
        different = [name for name in self.settings if log["settings"].get(name) != self.settings[name]]
        if different:
            raise ValueError(
                f"{self.out} holds an unfinished model that was begun with other settings ({', '.join(different)}): "
                f"repeat that command to go on, or name a new folder"
            )
        self.errors = [LayerErrors(**entry) for entry in log["linears"]]
        self.clock = PartClock(log["parts"])
        self.seconds_before, self.peak_before = log["seconds"], log["peak_memory_bytes"]

    def has_layer(self, index: int) -> bool:
        return any(entry.layer == index for entry in self.errors) and self._layer_path(index).is_file()

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        return load_file(self._layer_path(index))

    def add_layer(self, index: int, tensors: dict[str, torch.Tensor], errors: Sequence[LayerErrors]) -> None:
        """Writes a finished layer. The log is written last: a layer counts as finished once the log names it."""
        with self.clock.part(FILES):
            _save(tensors, self._layer_path(index))
        self.errors = [entry for entry in self.errors if entry.layer != index] + list(errors)
        self._write_log()

    def finish(self, config: GPTQConfig, damp: float, static_groups: bool) -> None:
        """Writes all tensors outside of decoder layers, the index, the small files, and config.json."""
        with self.clock.part(FILES):
            self._write_rest()
        quantization = config.to_json(damp, QUANTIZER) | {"static_groups": static_groups}
        self._write_json("quantize_config.json", quantization)
        self._write_log()
        original = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        self._write_json("config.json", original | {"quantization_config": quantization})

    def _write_rest(self) -> None:
        tensors = TensorFolder(self.source)
        rest = {name: tensors.get(name) for name in sorted(tensors.files) if not name.startswith("model.layers.")}
        _save(rest, self._path(0))
        for path in self.source.iterdir():
            if path.is_file() and not path.name.endswith(_NOT_COPIED) and path.name != "config.json":
                shutil.copy2(path, self.out / path.name)
        copy_chat_templates(self.source, self.out)
        self._write_index()

    def _write_index(self) -> None:
        weight_map, total = {}, 0
        for number in range(self.num_layers + 1):
            for name, tensor in load_file(self._path(number)).items():
                weight_map[name], total = self._path(number).name, total + tensor.nbytes
        self._write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _write_log(self) -> None:
        """Writes the log. `seconds`, `parts` and memory cover all runs of the job."""
        content = {
            "settings": self.settings,
            "threads": torch.get_num_threads(),
            "seconds": self.seconds_before + time.perf_counter() - self.started,
            "parts": self.clock.seconds,
            "peak_memory_bytes": max(self.peak_before, peak_memory_bytes()),
            "linears": [asdict(entry) for entry in self.errors],
        }
        self._write_json(LOG, content)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        beside = self.out / f".{name}.tmp"
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, self.out / name)

    def _layer_path(self, index: int) -> Path:
        return self._path(index + 1)

    def _path(self, number: int) -> Path:
        return self.out / f"model-{number + 1:05}-of-{self.num_layers + 1:05}.safetensors"


def _read_log(out: Path) -> dict[str, Any]:
    try:
        log: dict[str, Any] = json.loads((out / LOG).read_text(encoding="utf-8"))
        log["settings"], log["linears"], log["parts"], log["seconds"], log["peak_memory_bytes"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{out / LOG} is damaged or of another version: name a new folder") from None
    return log


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    beside = path.with_name(f".{path.name}.tmp")  # hidden, and not *.safetensors, so no loader reads it
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata={"format": "pt"})
    os.replace(beside, path)


def digest_of(windows: Sequence[Sequence[int]]) -> str:
    """Returns digits that tell one set of calibration sequences from another."""
    return hashlib.sha256(json.dumps([list(window) for window in windows]).encode()).hexdigest()[:12]


def _source_digest(source: Path) -> str:
    """Returns digits that identify a source by its config and the names and sizes of its files, without reading the
    weights.
    """
    parts = [(source / "config.json").read_text(encoding="utf-8")]
    parts += sorted(f"{path.name} {path.stat().st_size}" for path in source.glob("*.safetensors"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
