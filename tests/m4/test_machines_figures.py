"""The pictures of measurements on docs/learn/04c show the result files of today.

Milestone: M4. A picture was once two result files behind the table beside it.
"""

import json

import pytest
from PIL import Image

from tests.page_checks import ROOT
from tests.script_loader import load_script

pytestmark = pytest.mark.m4

files = load_script("figure_files")
figures = load_script("draw_machines_figures")


@pytest.mark.parametrize("name", figures.MEASURED)
def test_a_picture_shows_the_results_of_today(name: str) -> None:
    with Image.open(ROOT / f"docs/learn/img/{name}.png") as image:
        shown = image.info.get("Description")
    assert shown == files.hash_of(figures.MEASURED[name]()), "run scripts/dev/draw_machines_figures.py"


def test_another_result_is_another_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above fails as soon as a result file is written anew."""
    before = files.hash_of(figures.conditions())
    arms = json.loads((ROOT / "milestones/m4/results/compare_peers_busy2_cpu.json").read_text())["arms"]
    arms["llamacpp"]["modes"]["single"]["output_tok_per_s"]["median"] += 0.1
    monkeypatch.setattr(figures, "arms_of", lambda name: arms)
    assert files.hash_of(figures.conditions()) != before
