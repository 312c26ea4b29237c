"""Build hook: the wheel carries milestones/ as folovllm/_milestones, so that `folovllm learn` works without a clone.

Milestone: M0. vLLM counterpart: none. Measurements (results/) stay in the repository.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CarryMilestones(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling finds the only hook class of this file by itself."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Names the files to carry. An editable install needs none: the package finds the folder of its clone."""
        if version == "editable":
            return
        folder = Path(self.root, "milestones")
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if path.is_file() and not {"results", "__pycache__"} & set(inside.parts):
                build_data["force_include"][str(path)] = f"folovllm/_milestones/{inside.as_posix()}"
