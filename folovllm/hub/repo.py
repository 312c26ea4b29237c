"""From a HuggingFace id (`Qwen/Qwen3-0.6B`) to a local snapshot (milestone M0).

huggingface_hub downloads, resumes, locks and caches. This file decides what to fetch (never a pickle) and turns its
dozen exceptions into one message. A complete snapshot in its cache is used as it is, without any network access, which
makes a second start fast; `refresh=True` (`pull`) asks the network. vLLM's counterpart is `download_weights_from_hf` in
vllm/model_executor/model_loader/weight_utils.py. Left out: revisions, tokens as arguments (huggingface_hub's own login
is used).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from folovllm.hub.aliases import ALIASES
from folovllm.hub.errors import ModelFolderError, ModelNotFoundError, problem
from folovllm.hub.folder import check_model_folder

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_PART}/{_PART}")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
# Mistral's `consolidated*` repeats the weights; subfolders hold other formats (onnx/, original/), and chat templates.
_UNWANTED = ("consolidated*", "*/*.safetensors", "*/*.json", "*/tokenizer.model")


def is_repo_id(name: str) -> bool:
    """Returns whether `name` has the form `org/name`."""
    return _REPO_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def download_repo(
    repo_id: str,
    download_dir: str | Path | None = None,
    refresh: bool = False,
    check: Callable[[Path], Path] = check_model_folder,
    weights: bool = True,
) -> Path:
    """Returns the snapshot folder of `repo_id`: from the cache if it is complete there, from the network otherwise.

    `check` says what a complete snapshot has. Without `weights` none are downloaded.
    """
    if not refresh:
        try:
            return check(_snapshot(repo_id, download_dir, offline=True, weights=weights))
        except (OSError, ValueError):
            pass  # not there yet, or only in part
    try:
        folder = _snapshot(repo_id, download_dir, offline=False, weights=weights)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelNotFoundError(_unreachable(repo_id, error)) from error
    try:
        return check(folder)
    except ModelFolderError as error:
        raise ModelFolderError(f"HuggingFace repository {repo_id!r}, whose usable files are here: {error}") from None


def _snapshot(repo_id: str, download_dir: str | Path | None, offline: bool, weights: bool = True) -> Path:
    from huggingface_hub import snapshot_download

    cache = None if download_dir is None else str(Path(download_dir).expanduser())
    wanted, unwanted = list(_WANTED), list(_UNWANTED)
    if not weights:
        unwanted.append("*.safetensors")
    folder = snapshot_download(
        repo_id, cache_dir=cache, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=offline
    )
    return Path(folder)


def _unreachable(repo_id: str, error: Exception) -> str:
    same = [alias.name for alias in ALIASES.values() if alias.hf_id.lower() == repo_id.lower()]
    pull = f"; 'folovllm pull {same[0]}' gets the same model without HuggingFace" if same else ""
    todo = f"check the id on huggingface.co, the network, and 'hf auth login' for a gated model{pull}"
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    found = f"{type(error).__name__}: {first_line}"
    return f"cannot get {repo_id!r}: " + problem("a HuggingFace repository that can be downloaded", found, todo)
