"""From the name that a user typed to a checked model folder (milestone M0).

The first match wins: an alias; something on disk; something that is written like a path (so that a typing error in a
path never starts a download); a HuggingFace id. A folder with the name of an alias can be reached as `./name`. vLLM's
counterpart is `DefaultModelLoader._prepare_weights` in vllm/model_executor/model_loader/default_loader.py. Left out:
revisions and remote file systems.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from folovllm.hub.aliases import ALIASES, alias_folder, unknown_name
from folovllm.hub.errors import ModelFolderError, ModelNotFoundError, problem
from folovllm.hub.fetch import pull as pull_model
from folovllm.hub.folder import check_model_folder, check_tokenizer_folder
from folovllm.hub.repo import download_repo, is_repo_id


def find_model(
    name: str | Path,
    download_dir: str | Path | None = None,
    pull: bool = False,
    tokenizer: bool = True,
    weights: bool = True,
) -> Path:
    """Returns the folder of the model called `name`: an alias, a local HuggingFace folder or a HuggingFace id.

    If an alias has not been pulled yet, it is pulled now if `pull` is set; otherwise the error names the command.
    `download_dir` replaces the default cache folder for aliases and ids. `tokenizer=False` and `weights=False` accept a
    folder or a repository without those. Raises `ModelNotFoundError` or `ModelFolderError`.
    """
    needs = {"tokenizer": tokenizer, "weights": weights}
    return _find(name, download_dir, pull, lambda folder: check_model_folder(folder, **needs), weights)


def find_tokenizer(name: str | Path, download_dir: str | Path | None = None) -> Path:
    """The folder of the tokenizer called `name`, which may be any name of a model; no other file of it is needed."""
    return _find(name, download_dir, True, check_tokenizer_folder, weights=False)


def _find(
    name: str | Path,
    download_dir: str | Path | None,
    pull: bool,
    check: Callable[[Path], Path],
    weights: bool,
) -> Path:
    text = str(name).strip()
    if not text:
        raise ModelNotFoundError(problem("a model name", "an empty one", f"try {next(iter(ALIASES))!r}"))
    if text in ALIASES:
        return _find_alias(text, download_dir, pull)
    path = Path(text).expanduser()
    if path.is_dir():
        return check(path)
    if path.exists():
        raise ModelFolderError(f"{text}: " + problem("a folder", "a file", _file_hint(path)))
    if isinstance(name, Path) or _looks_like_path(text):
        raise ModelNotFoundError(_no_such_folder(path))
    if is_repo_id(text):
        return download_repo(text, download_dir, check=check, weights=weights)
    raise ModelNotFoundError(unknown_name(text))


def _find_alias(name: str, download_dir: str | Path | None, pull: bool) -> Path:
    folder = alias_folder(ALIASES[name], download_dir)
    if pull:
        return pull_model(name, download_dir)
    if folder.is_dir():
        return check_model_folder(folder)
    option = "" if download_dir is None else f" --download-dir {download_dir}"
    todo = f"run 'folovllm pull {name}{option}' once"
    raise ModelNotFoundError(f"model {name!r} is not here yet: " + problem(f"the folder {folder}", "nothing", todo))


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1


def _no_such_folder(path: Path) -> str:
    """Returns a message that shows how far the path exists, because the typing error comes right after."""
    parent = path.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    near = sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))[:8]
    found = f"nothing; the path exists up to {parent}, which holds {', '.join(near) or 'no folder'}"
    return f"no model at {path}: " + problem("a folder", found, "correct the path")


def _file_hint(path: Path) -> str:
    if path.suffix == ".gguf":
        return "a GGUF is read only by 'folovllm pull'; pass a folder with safetensors"
    return f"pass the folder that holds it, {str(path.parent)!r}"
