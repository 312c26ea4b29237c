"""compare_kernels.py: versions under their own namespaces, the rounds that count, and the distance of cores."""

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from folovllm.csrc.build import load_ops
from tests.script_loader import load_script

pytestmark = pytest.mark.m4

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("compare_kernels")


def test_a_version_moves_into_a_namespace_of_its_own(script: ModuleType) -> None:
    source = (
        'namespace folovllm {\nvoid f(); }\nTORCH_LIBRARY_FRAGMENT(folovllm, m) { folovllm::f(); say("folovllm: hi"); }'
    )
    moved = script._NAMESPACES.sub("other", source)
    assert moved == source.replace("folovllm {", "other {").replace("(folovllm,", "(other,").replace(
        "folovllm::", "other::"
    )


def test_every_source_is_left_without_the_old_namespace(script: ModuleType) -> None:
    for path in [*(ROOT / script.SOURCES).glob("*.cpp"), *(ROOT / script.SOURCES).glob("*.h")]:
        moved = script._NAMESPACES.sub("other", path.read_text())
        assert "folovllm::" not in moved and "namespace folovllm {" not in moved and "(folovllm," not in moved, (
            path.name
        )


def test_sources_come_from_a_folder_and_anything_else_is_refused(script: ModuleType, tmp_path: Path) -> None:
    sources = script.checkout(str(ROOT), tmp_path / "a")
    assert (sources / "decoder_stack.cpp").read_text() == (ROOT / script.SOURCES / "decoder_stack.cpp").read_text()
    with pytest.raises(SystemExit, match="neither a folder"):
        script.checkout("no-such-commit", tmp_path)


def test_rounds_in_which_the_cores_moved_do_not_count(script: ModuleType) -> None:
    trips = iter([50.0, 50.0, 50.0, 400.0, 400.0, 400.0])  # before and after three rounds; in the second they moved
    seen: list[str] = []
    rounds = script.rounds({"a": "a", "b": "b"}, {"case": seen.append}, lambda: next(trips))
    near, moved, far = (sorted(next(rounds)) for _ in range(3))
    assert near == [("near", "case", "a"), ("near", "case", "b")] and moved == []
    assert far == [("far", "case", "a"), ("far", "case", "b")]
    a, b = (["a"] * (1 + script.RUNS_PER_ROUND), ["b"] * (1 + script.RUNS_PER_ROUND))
    assert seen == a + b + b + a + a + b, "they take turns"


@pytest.mark.skipif(load_ops() is None, reason="no C++ kernels here")
def test_the_operators_run_and_a_version_that_computes_something_else_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "LAYERS", 2)
    monkeypatch.setattr(script, "DECODE_REQUESTS", (1, 3))
    monkeypatch.setattr(script, "PROMPT_LENS", (5, 20))
    ops = torch.ops.folovllm
    torch.manual_seed(0)
    runs = script.cases(script.Model())
    assert list(runs) == ["decode 1", "decode 3", "prompts 25", "attention 3x256"]
    with torch.inference_mode():
        script.check_same({"a": ops, "b": ops}, runs)
        other = SimpleNamespace(
            name="folovllm",
            decoder_stack=SimpleNamespace(default=lambda *args: [1.1 * t for t in ops.decoder_stack.default(*args)]),
            paged_attention=SimpleNamespace(default=lambda out, *args: out.fill_(1.0)),
        )
        with pytest.raises(SystemExit, match="b computes something else than a on decode 1"):
            script.check_same({"a": ops, "b": other}, runs)
        attention = {case: run for case, run in runs.items() if case.startswith("attention")}
        with pytest.raises(SystemExit, match="b computes something else than a on attention 3x256"):
            script.check_same({"a": ops, "b": other}, attention)


@pytest.mark.skipif(load_ops() is None, reason="no C++ kernels here")
def test_a_word_takes_some_time_from_core_to_core() -> None:
    nanoseconds = torch.ops.folovllm.core_round_trip_ns(5)
    assert nanoseconds > 1 and not math.isnan(nanoseconds)
