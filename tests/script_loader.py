"""A file of scripts/ or scripts/dev/ as a module: they are programs, in no package, and find those in their folder."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path += [str(SCRIPTS), str(SCRIPTS / "dev")]


def load_script(name: str) -> ModuleType:
    return importlib.import_module(name)
