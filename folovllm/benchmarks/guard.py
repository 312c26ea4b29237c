"""Runs a command and, if the process that asked for it dies, ends the command and everything that it started.

Milestone: M4. vLLM counterpart: none. A stand-alone file: `python guard.py COMMAND...`, which runner.py starts in a
session of its own with a pipe as stdin. The pipe stays empty; when its other end closes, its owner is gone, even if it
was ended by SIGKILL.
"""

import os
import signal
import subprocess
import sys
import threading


def main(command: list[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=end_with_owner, daemon=True).start()
    status = child.wait()
    return status if status >= 0 else 128 - status  # E.g. killed by signal 9 -> 137, as a shell says it


def end_with_owner() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)  # this process included


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # not sys.exit: the thread is still reading
