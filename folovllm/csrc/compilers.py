"""Which C++ compiler there is, and which of our flags it accepts: g++, clang, or Apple's clang.

Milestone: M4. vLLM counterpart: the checks of CMAKE_CXX_COMPILER_VERSION in cmake/cpu_extension.cmake.

A flag is tried on a file of one line instead of looked up by the compiler's name and version: "clang" has a version
numbering of its own on macOS, and g++ is clang there.
"""

import platform
import shutil
import subprocess
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
# The package of a compiler, by the program that installs it.
PACKAGES = {
    "apt-get": "apt-get install g++",
    "dnf": "dnf install gcc-c++",
    "zypper": "zypper install gcc-c++",
    "pacman": "pacman -S gcc",
    "apk": "apk add g++",
}
_OTHER_SYSTEMS = "g++ 11 or clang 14, or later"


class BuildError(Exception):
    """There is no library; the message says why."""


def find_compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def how_to_install() -> str:
    """E.g. "apt-get install g++"."""
    if platform.system() == "Darwin":
        return "xcode-select --install"
    if platform.system() == "Windows":
        return "Windows itself is not supported: use WSL, and in it apt-get install g++"
    return next((command for tool, command in PACKAGES.items() if shutil.which(tool)), _OTHER_SYSTEMS)


class Compiler:
    """A compiler that is asked which flags it accepts."""

    def __init__(self, path: str, folder: Path) -> None:
        """`folder` is for temporary files."""
        self.path, self._folder = path, folder

    def require(self, flags: tuple[str, ...], why: str) -> list[str]:
        """`flags` if they are accepted. Raises BuildError, with what the compiler says, if not."""
        refusal = self.refusal(flags)
        if refusal is not None:
            raise BuildError(f"{self.path} does not compile with {' '.join(flags)}, {why}\n{refusal}")
        return list(flags)

    def accepted(self, flags: tuple[str, ...]) -> list[str]:
        """Those of `flags` that are accepted: for flags that only make the library a bit better."""
        return [flag for flag in flags if self.refusal((flag,)) is None]

    def first_accepted(self, flags: tuple[str, ...], why: str) -> list[str]:
        """The first of `flags` that is accepted, as a list. Raises BuildError if all are refused."""
        refusals = []
        for flag in flags:
            refusal = self.refusal((flag,))
            if refusal is None:
                return [flag]
            refusals.append(refusal)
        if flags:
            raise BuildError(f"{self.path} does not accept {' or '.join(flags)}, {why}\n" + "\n".join(refusals))
        return []

    def refusal(self, flags: tuple[str, ...]) -> str | None:
        """What the compiler says against `flags`, or None if it accepts them."""
        source, built = self._folder / "probe.cpp", self._folder / "probe.o"
        source.write_text("int probe() { return 0; }\n", encoding="utf-8")
        command = [self.path, "-Werror", *flags, "-c", str(source), "-o", str(built)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        source.unlink()
        built.unlink(missing_ok=True)
        return None if done.returncode == 0 else done.stdout.strip() or f"status {done.returncode}"
