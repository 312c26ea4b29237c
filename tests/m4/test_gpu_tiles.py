"""scripts/dev/gpu_tiles.py without a GPU: the tile sizes it tries, what it notes of each, what it concludes (R4.66).

That every candidate compiles is shown in test_triton_paged.py and, for M7's kernels, in tests/m7/test_triton_gptq.py.
The script itself runs in the rehearsal of test_gpu_all.py.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from triton.runtime.errors import OutOfResources

from folovllm.sim.hardware import HARDWARE
from tests.script_loader import load_script

pytestmark = pytest.mark.m4

script, floors = load_script("gpu_tiles"), load_script("gpu_floor")
BF16 = torch.bfloat16
CASES = {case.name: case for case in floors.cases("qwen3-8b")}


@pytest.mark.parametrize(
    "case, default",
    [
        ("prompt of 8,192", "64 rows, 32 keys, 4 warps, 3 stages"),
        ("decode 32 x 1,024", "16 rows, 32 keys, 4 warps, 3 stages, 256 keys per part"),
        ("GPTQ down 1", "1 rows, 64 outputs, 128 inputs, 4 warps, 3 stages"),
        ("GPTQ down 16", "16 rows, 64 outputs, 64 inputs, 4 warps, 3 stages"),
        ("GPTQ down 256", "64 rows, 128 outputs, 64 inputs, 8 warps, 3 stages"),
    ],
)
def test_the_default_comes_first(case: str, default: str) -> None:
    """Candidates that are the default, or each other, would be fewer."""
    found = script.candidates(CASES[case], BF16, "cuda")
    lists = {"prompt": script.CHUNKS, "decode": script.SINGLES}
    tried = lists.get(CASES[case].kind) or {1: script.GEMVS, 16: script.FEW_ROWS}.get(
        CASES[case].rows, script.MANY_ROWS
    )
    assert next(iter(found)) == default and len(found) == 1 + len(tried)


def test_no_tile_has_inputs_of_two_groups() -> None:
    for group_size in (32, 96, 128):
        for rows in (1, 16, 64):
            tiles = script.gptq_candidates(rows, group_size, BF16)
            assert all(group_size % each.inputs == 0 for each in tiles)


def test_the_cases_are_those_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few enough for a minute: each new tile is compiled once, and a measurement takes about 0.1 s."""
    monkeypatch.setattr(script, "processors", lambda device: 132)
    found = script.Bench("cuda", HARDWARE["h200"], clock=None).cases(script.OURS["cuda"])
    names = [case.name for case in found]
    assert len(set(names)) == len(names) <= 130
    operations = dict.fromkeys(name.partition(":")[0] for name in names)
    assert list(operations) == [
        *(f"qwen3-8b decode {name}" for name in ("1 x 1,024", "32 x 1,024", "256 x 1,024", "1 x 8,192")),
        *(f"qwen3-8b prompt of {name}" for name in ("1,024", "8,192")),
        *(f"qwen3-8b GPTQ {linear} {rows}" for linear in ("gate_up", "down") for rows in (1, 16, 64, 256)),
    ]


class FakeClock:
    def time(self, call: Any) -> Any:
        call()
        return load_script("gpu_result").Timing(device=1e-3, launch=0.0)


def measure(monkeypatch: pytest.MonkeyPatch, ours: Any) -> Any:
    """A candidate whose call is `ours`, where torch's result is a 1."""
    contest = script.Contest(ours, lambda: torch.ones(1), lambda tiles: ours)
    monkeypatch.setitem(script.CONTESTS, "gptq", lambda *args: contest)
    bench = script.Bench("cpu", HARDWARE["h200"], FakeClock())
    return bench.measure(CASES["GPTQ down 1"], "some tiles", None, default=True)


def test_a_candidate_is_checked_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = measure(monkeypatch, lambda: torch.full((1,), 1.001))
    assert (row["case"], row["tiles"], row["default"]) == ("qwen3-8b GPTQ down 1", "some tiles", True)
    floor = CASES["GPTQ down 1"].cost.floor(HARDWARE["h200"])
    assert row["us"] == 1000.0 and row["of_floor"] == round(floor / 1e-3, 3)


def test_candidates_share_the_data_of_their_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """To make it takes longer than to time a candidate; the data of two cases may not fit beside each other."""
    made: list[str] = []

    def contest(case: Any, *args: Any) -> Any:
        made.append(case.name)
        return script.Contest(lambda: torch.ones(1), lambda: torch.ones(1), lambda tiles: lambda: torch.ones(1))

    monkeypatch.setitem(script.CONTESTS, "gptq", contest)
    bench = script.Bench("cpu", HARDWARE["h200"], FakeClock())
    for name in ("GPTQ down 1", "GPTQ down 1", "GPTQ down 16", "GPTQ down 16"):
        bench.measure(CASES[name], "some tiles", None, default=False)
    assert made == ["GPTQ down 1", "GPTQ down 16"]


@pytest.mark.parametrize("result", [1.1, float("nan")])
def test_a_wrong_result_is_an_error(monkeypatch: pytest.MonkeyPatch, result: float) -> None:
    with pytest.raises(AssertionError, match="is off by"):
        measure(monkeypatch, lambda: torch.full((1,), result))


@pytest.mark.parametrize(
    "error, refused",
    [
        (OutOfResources(262_144, 232_448, "shared memory"), "OutOfResources: out of resource: shared memory"),
        (RuntimeError("PassManager::run failed"), "RuntimeError: PassManager::run failed"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
    ],
    ids=str,
)
def test_tiles_that_a_gpu_refuses_are_no_failure(
    monkeypatch: pytest.MonkeyPatch, error: Exception, refused: str | None
) -> None:
    """A bad memory access is one: after it, CUDA answers the process no longer."""

    def ours() -> torch.Tensor:
        raise error

    if refused is None:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            measure(monkeypatch, ours)
    else:
        (row,) = measure(monkeypatch, ours)
        assert row["refused"].startswith(refused) and "us" not in row


def test_what_it_concludes() -> None:
    rows = [
        {"case": "a", "tiles": "1", "default": True, "us": 30.0, "of_floor": 0.2},
        {"case": "a", "tiles": "2", "default": False, "us": 20.0, "of_floor": 0.3},
        {"case": "a", "tiles": "3", "default": False, "refused": "too large"},
        {"case": "b", "tiles": "1", "default": True, "refused": "too large"},
        {"case": "b", "tiles": "2", "default": False, "us": 1.0, "of_floor": 1.0},
    ]
    best = {"default": "1", "default_us": 30.0, "best": "2", "best_us": 20.0, "gain": 1.5, "of_floor": 0.3}
    assert script.choices(rows) == {"a": best}


def test_tiles_are_an_argument_of_the_launches() -> None:
    """The backend and the multiplication take other tiles; nothing has to be replaced in their modules."""
    spec = script.AttentionSpec(32, 8, 128, BF16, torch.device("cuda"), 16)
    tiles = script.chunk_candidates(script.triton_paged.tile_sizes(spec))[-1]
    backend = script.triton_paged.TritonPagedBackend(spec, tiles)
    assert backend.tiles is tiles
    assert {"BLOCK_ROWS": 128, "BLOCK_KV": 128, "num_warps": 8, "num_stages": 3}.items() <= backend.chunk_args.items()
    split = script.single_candidates(script.triton_paged.tile_sizes(spec))[1]
    assert script.triton_paged.TritonPagedBackend(spec, split).single_args["SPLIT_KV"] == 128
