"""Build hook: the wheel carries milestones/ and docs/learn, so `folovllm learn` and `docs` work without a clone.

Milestone: M0. vLLM counterpart: none. Measurements (results/) and pictures stay in the repository.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CarryFolders(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling finds the only hook class of this file by itself."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Names the files to carry. An editable install needs none: the package finds the folders of its clone."""
        if version == "editable":
            return
        root = Path(self.root)
        for path in carried(root):
            build_data["force_include"][str(path)] = f"folovllm/_{path.relative_to(root).as_posix()}"


def carried(root: Path) -> Iterator[Path]:
    """The files that the wheel holds under folovllm/_milestones and folovllm/_docs."""
    yield root / "docs/data/pages.toml"
    yield from sorted(root.glob("docs/learn/*.md"))
    for path in sorted(root.glob("milestones/**/*")):
        if path.is_file() and not {"results", "__pycache__"} & set(path.parts):
            yield path
