"""bind: the socket of the server, a TCP port or a Unix domain socket.

Milestone: M8. vLLM counterpart: create_server_socket in vllm/entrypoints/openai/api_server.py.
"""

import contextlib
import errno
import fcntl
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from folovllm.entrypoints.openai.server_options import ServerOptions


@contextlib.contextmanager
def bind(options: ServerOptions) -> Iterator[socket.socket]:
    """A bound socket that does not listen yet. A Unix socket's file is removed at the end.

    Raises ValueError if the address is in use, or not an address of this machine.
    """
    if options.uds is not None:
        with _bind_unix(Path(options.uds)) as listener:
            yield listener
        return
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((options.host, options.port))
        except OSError as error:
            raise ValueError(why_not_bound(options, error)) from None
        yield listener


def why_not_bound(options: ServerOptions, error: OSError) -> str:
    """What to do about an address that cannot be bound, or that another process has begun to listen on meanwhile."""
    if error.errno == errno.EADDRINUSE:
        return f"port {options.port} of {options.host} is in use: choose another one with --port, or --port 0 for any"
    if error.errno == errno.EACCES:
        return f"port {options.port} needs more rights: choose one above 1023 with --port"
    return f"cannot listen on {options.host} port {options.port}: {error.strerror or error}; correct --host or --port"


@contextlib.contextmanager
def _bind_unix(path: Path) -> Iterator[socket.socket]:
    """Takes the place of a socket file that no process listens on, as after a crash, and of no other file."""
    with _locked(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.stat().st_mode):
                raise ValueError(f"--uds {path}: the file exists and is no socket; choose another name")
            if _is_listening(path):
                raise ValueError(f"--uds {path}: another process listens on this socket; choose another name")
            path.unlink()
        try:
            listener.bind(str(path))
        except OSError as error:
            raise ValueError(f"--uds {path}: {error.strerror or error}; correct the path") from None
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file beside the socket. While a server loads its model, its socket does not listen yet, and looks
    like one that a crash has left: without the lock a second server would take its place.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        file = lock.open("w")
    except OSError as error:
        raise ValueError(f"--uds {path}: {error.strerror or error}; correct the path") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"--uds {path}: another process listens on this socket, or is about to; choose another name"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0
