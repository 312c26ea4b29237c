"""A virtual environment for each peer, made on first use in the user's cache.

Milestone: M4. vLLM counterpart: none.

    ~/.cache/folovllm/peers/vllm/            the environment
    ~/.cache/folovllm/peers/vllm/folovllm_peer.json   written last: an interrupted install has none and is done again
    ~/.cache/folovllm/peers/vllm.log         what pip said

An environment without that file is taken over as it is if the peer's import works in it: a user made it by hand. If a
peer has got more requirements since its environment was made, only the new ones are installed.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from folovllm.benchmarks.runner import run_child, tail
from folovllm.hub import default_download_dir
from scripts.peers.catalog import Environment, Peer, PeerError

MARKER = "folovllm_peer.json"
COMPILERS = ("c++", "g++", "clang++")
INSTALL_TIMEOUT, PROBE_TIMEOUT = 3600.0, 300.0
Say = Callable[[str], None]


def default_peers_dir() -> Path:
    """Beside the models: the same cache."""
    return default_download_dir().parent / "peers"


def python_of(peer: Peer, root: Path) -> str:
    """The interpreter that runs the peer's adapter."""
    return sys.executable if peer.environment is None else str(_python(root / peer.environment.name))


def state_of(environment: Environment, root: Path) -> str:
    """For `--list`: "ready", "not installed" or what is between."""
    folder = root / environment.name
    if _is_complete(folder, environment):
        return "ready"
    return "not marked as complete" if _python(folder).exists() else "not installed"


def ensure_environment(environment: Environment, root: Path, say: Say) -> None:
    """Make the environment, unless it is there. `PeerError` shows the end of pip's log."""
    folder = root / environment.name
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{environment.name}.lock"):  # another run may be at it: wait for it
        if _is_complete(folder, environment):
            return
        log = root / f"{environment.name}.log"
        log.unlink(missing_ok=True)
        if not (folder / MARKER).exists() and _python(folder).exists() and _works(environment, folder, log):
            say(f"[setup] {environment.name}: taking over the environment in {folder}")
            _remove_unwanted(environment, folder, log)
        elif (missing := _missing(environment, folder)) is not None:
            _install_packages(missing, environment, folder, log, say)
        else:
            _install(environment, folder, log, say)
        (folder / MARKER).write_text(json.dumps({"requirements": environment.requirements}) + "\n")


def _install(environment: Environment, folder: Path, log: Path, say: Say) -> None:
    _require_compiler(environment)
    shutil.rmtree(folder, ignore_errors=True)
    say(f"[setup] {environment.name}: new environment in {folder} ({environment.about}); log: {log}")
    _run([sys.executable, "-m", "venv", str(folder)], environment, log, "python -m venv")
    _install_packages(environment.requirements, environment, folder, log, say)


def _install_packages(requirements: Sequence[str], environment: Environment, folder: Path, log: Path, say: Say) -> None:
    # pip's cache holds wheels by their version, not by the flags that they were compiled with.
    options = ["--no-cache-dir"] if environment.needs_compiler else []
    for requirement in requirements:
        say(f"[setup] {environment.name}: pip install {requirement} ...")
        _run([*_pip(folder), "install", *options, requirement], environment, log, f"pip install {requirement}")
    _remove_unwanted(environment, folder, log)  # before the probe, which a torchvision of another build breaks
    if not _works(environment, folder, log):
        raise PeerError(f"{environment.name} was installed, but `{environment.probe}` fails:\n{tail(log)}")


def _remove_unwanted(environment: Environment, folder: Path, log: Path) -> None:
    if environment.unwanted:
        command = [*_pip(folder), "uninstall", "--yes", *environment.unwanted]  # of what is not there, pip only warns
        _run(command, environment, log, "pip uninstall")


def _require_compiler(environment: Environment) -> None:
    if environment.needs_compiler and not any(shutil.which(name) for name in COMPILERS):
        raise PeerError(
            f"{environment.name} is compiled on this machine and there is no C++ compiler ({', '.join(COMPILERS)}); "
            "install one (e.g. apt-get install g++) or leave this peer out with --peers"
        )


def _run(command: list[str], environment: Environment, log: Path, what: str) -> None:
    """One command of the install; `PeerError` if it fails."""
    try:
        status = run_child(command, INSTALL_TIMEOUT, log, environment.variables)
    except TimeoutError as error:
        raise PeerError(f"{what} {error}; log: {log}") from None
    if status != 0:
        raise PeerError(
            f"{what} failed with status {status}; check the network and pip's index (pip config list), or leave this "
            f"peer out with --peers; the end of {log}:\n{tail(log)}"
        )


def _works(environment: Environment, folder: Path, log: Path) -> bool:
    try:
        return run_child([str(_python(folder)), "-c", environment.probe], PROBE_TIMEOUT, log) == 0
    except TimeoutError:
        return False


def _is_complete(folder: Path, environment: Environment) -> bool:
    return _missing(environment, folder) == []


def _missing(environment: Environment, folder: Path) -> list[str] | None:
    """Returns the requirements that the environment still lacks.

    Returns None if the environment is not there, or was made for other versions and must be made anew.
    """
    try:
        installed = json.loads((folder / MARKER).read_text())["requirements"]
    except (OSError, ValueError, KeyError):
        return None
    if not _python(folder).exists() or not set(installed) <= set(environment.requirements):
        return None
    return [requirement for requirement in environment.requirements if requirement not in installed]


def _pip(folder: Path) -> list[str]:
    return [str(_python(folder)), "-m", "pip", "--disable-pip-version-check", "--no-input"]


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
