"""bench_attention.py: a decode step of many layers, what it is held against, and what a user may type."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.script_loader import load_script

pytestmark = pytest.mark.m4


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("bench_attention")
    monkeypatch.setattr(module, "BANDWIDTH_BYTES", 2**20)
    monkeypatch.setattr(module, "MAX_LAYERS", 3)
    monkeypatch.setattr(module, "CASES", [module.Case("prefill 40", 1, 40, 40), module.Case("decode 2x40", 2, 40, 1)])
    return module


def test_a_step_has_as_many_layers_as_memory_allows(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "MAX_LAYERS", 30)
    layers = {n: script.Case("decode", 32, n, 1).num_layers(torch.bfloat16) for n in script.DECODE_LENS}
    assert layers == {256: 30, 512: 21, 1024: 10, 2048: 5, 4096: 2}, "30 layers, or 256 MiB of K and V"
    assert script.Case("prefill", 1, 256, 256).num_layers(torch.bfloat16) == 1


def test_a_decode_step_runs_every_layer_on_pages_of_its_own(script: ModuleType) -> None:
    setup = script.Setup("torch_naive", script.CASES[1], torch.float32)
    assert len({cache.data_ptr() for cache in setup.caches}) == 3
    seen: list[int] = []
    forward = setup.backend.forward
    setup.backend.forward = lambda query, cache, metadata: (
        seen.append(cache.data_ptr()) or forward(query, cache, metadata)
    )
    output = setup.run()
    assert seen == [cache.data_ptr() for cache in setup.caches]
    metadata = setup.metadata(1)
    setup.backend.prepare(metadata)
    torch.testing.assert_close(output, forward(setup.query, setup.caches[0], metadata))  # all hold the same
    assert setup.forward_seconds[0] > 0 and 0 < setup.first_seconds[0] < 3.001 * setup.forward_seconds[0]


def test_a_decode_step_is_held_against_the_read_before_it(script: ModuleType) -> None:
    class Memory:
        def read(self) -> float:
            return 1e9

    setup = script.Setup("torch_naive", script.CASES[1], torch.float32)
    setup.run_from_memory(Memory(), torch.float32)
    kv_bytes = 2 * 2 * 40 * 3 * 64 * 4  # K and V, requests, tokens, heads, numbers, bytes
    assert setup.times_kv_read == [pytest.approx(setup.forward_seconds[0] / (kv_bytes / 1e9))]


def test_it_writes_what_it_measured(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    json_path, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--backends", "torch_naive,torch_flash", "--dtype", "float32", "--threads", "1", "--repeats", "2"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *arguments, "--json", str(json_path), "--plot", str(plot)])
    try:
        script.main()
    finally:
        torch.set_num_threads(threads)
    report = json.loads(json_path.read_text())
    rows = {(r["case"], r["backend"]): r for r in report["results"]}
    assert set(rows) == {(case.name, name) for case in script.CASES for name in ("torch_naive", "torch_flash")}
    for (case, _), row in rows.items():
        decode = case.startswith("decode")
        assert row["rounds"] == 2 and row["num_layers"] == (3 if decode else 1)
        assert (row["times_kv_read"] is not None) == decode
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert report["command"] == "scripts/dev/bench_attention.py " + " ".join(arguments), "what was run, to be run again"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backends", "torch_naive,nope"], "no backend is called nope; there are torch_naive,"),
        (["--repeats", "0"], "expected a whole number of at least 1, got '0'"),
        (["--threads", "x"], "expected a whole number of at least 1, got 'x'"),
    ],
)
def test_what_cannot_be_run_is_refused(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_attention.py", *arguments])
    with pytest.raises(SystemExit):
        script.main()
    assert says in capsys.readouterr().err
