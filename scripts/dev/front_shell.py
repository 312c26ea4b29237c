"""Console blocks of the front pages: commands with what they print, run again in their order in an empty folder.

Milestone: M0. vLLM counterpart: none.

    $ folovllm ...     is run as it stands; what it prints stands below it, stdout and stderr
    $ ... 2> /dev/null the same without stderr (the speed of an answer, for one)
    > ...              in a block whose command is a conversation: what is typed

A Python block whose first line is `# NAME.py` is written to that file; `$ python NAME.py` runs it. Measured times
differ from run to run, so `same_but_for_times` compares two pages without them.
"""

import os
import pty
import re
import select
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEP = re.compile(
    r"^```python\n(?P<code># (?P<file>\w+\.py)\n.*?)^```|^```console\n(?P<session>.*?)^```", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(r"^\$ (?P<command>.+)$", re.MULTILINE)
TYPED = re.compile(r"^> (.+)$", re.MULTILINE)
TIME = re.compile(r"\d+\.\d+(?= (?:s|ms|tok/s|MiB)\b)|(?<=\w )\d+\.\d\d(?=[,)])")
COLUMNS = "110"
QUIET = " 2> /dev/null"
PATIENCE = 120  # seconds


def with_sessions(text: str) -> str:
    """`text` with every console block as its commands print it now."""
    with tempfile.TemporaryDirectory(prefix="folovllm-page-") as folder:
        return STEP.sub(lambda match: _step(match, Path(folder)), text)


def same_but_for_times(one: str, other: str) -> bool:
    return TIME.sub("#", one) == TIME.sub("#", other)


def _step(match: re.Match[str], folder: Path) -> str:
    if match["file"]:
        (folder / match["file"]).write_text(match["code"], encoding="utf-8")
        return match[0]
    typed = TYPED.findall(match["session"])
    commands = [found["command"] for found in COMMAND.finditer(match["session"])]
    if not commands:
        raise ValueError(f"a console block without a command: {match[0]!r}")
    run = _conversation if typed else _printed
    return "```console\n" + "".join(f"$ {command}\n{run(command, folder, typed)}" for command in commands) + "```"


def _argv(command: str) -> list[str]:
    program, *args = shlex.split(command.removesuffix(QUIET), comments=True)
    programs = {"folovllm": [sys.executable, "-m", "folovllm"], "python": [sys.executable]}
    if program not in programs:
        raise ValueError(f"the page may run folovllm and python only; got {command!r}")
    return [*programs[program], *args]


def _stderr(command: str, shown: int) -> int:
    return subprocess.DEVNULL if command.endswith(QUIET) else shown


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": COLUMNS, "TERM": "dumb", "NO_COLOR": "1"}


def _printed(command: str, folder: Path, typed: list[str]) -> str:
    result = subprocess.run(
        _argv(command), cwd=folder, env=_environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=_stderr(command, subprocess.STDOUT), text=True, encoding="utf-8",
    )  # fmt: skip
    return tidy(result.stdout)


def _conversation(command: str, folder: Path, typed: list[str]) -> str:
    """What a terminal shows while `typed` is typed, a line at each prompt, and then Ctrl-D."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        _argv(command), cwd=folder, env=_environment(), stdin=theirs, stdout=theirs, stderr=_stderr(command, theirs)
    )
    os.close(theirs)
    shown, lines = "", [*(line + "\n" for line in typed), "\x04"]
    try:
        while lines:
            shown += _until_prompt(ours)
            os.write(ours, lines.pop(0).encode())
        shown += _until_prompt(ours)  # the end: the program leaves, and its side closes
    finally:
        os.close(ours)  # ends a program that still waits for a line
        process.wait(timeout=PATIENCE)
    return tidy(re.sub(r"\n> \s*$", "\n", shown.replace("\r\n", "\n")))


def _until_prompt(terminal: int) -> str:
    """Reads until the program waits at "> ", or has ended. Raises ValueError if it is silent for too long."""
    shown = b""
    while not re.search(rb"(?:^|\n)> $", shown):
        if not select.select([terminal], [], [], PATIENCE)[0]:
            raise ValueError(f"the program neither ended nor asked with '> ' within {PATIENCE} s; it showed {shown!r}")
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux says so when the other side has closed
            break
        if not part:
            break
        shown += part
    return shown.decode()


def tidy(printed: str) -> str:
    """Without control codes and spaces at line ends, paths as in the root of a clone."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed).replace(f"{ROOT}/", "")
    return "".join(f"{line.rstrip()}\n" for line in plain.rstrip("\n").split("\n")) if plain.strip() else ""
