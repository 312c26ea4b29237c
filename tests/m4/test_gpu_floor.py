"""The cost model of the GPU kernels by hand, its floors, and the script that prints them (R4.60).

That the model names what the kernels really load and store is counted in test_triton_paged.py and, for M7's kernels,
in tests/m7/test_triton_gptq.py.
"""

import json
import re
import sys
from pathlib import Path

import pytest

from folovllm.model_shapes import SHAPES, shape_architecture
from folovllm.sim.cost import Calibration, CostModel
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.kernel_cost import GPTQShape, Work, gptq_bytes_per_weight, linear_sizes, step_work

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from tests.script_loader import load_script

pytestmark = pytest.mark.m4

floors = load_script("gpu_floor")
H200, L4 = HARDWARE["h200"], HARDWARE["l4"]


def test_a_floor_is_the_larger_of_two_times() -> None:
    work = Work(read=3e9, written=1.8e9, flops=989e9)  # 1 ms of either on an H200
    assert work.seconds(H200) == pytest.approx(1e-3) and work.bytes == 4.8e9
    assert (work + Work(flops=1)).bound(H200) == "compute" and (work + Work(read=1)).bound(H200) == "memory"
    assert (work * 3).seconds(H200) == pytest.approx(3e-3)


def test_a_decode_and_a_prompt_by_hand() -> None:
    """Qwen3-8B has 32 query heads and 8 KV heads of 128 numbers of 2 bytes."""
    decode, prompt = floors.cases("qwen3-8b", decodes=((32, 1024),), prompts=(1024,), writes=(), rows=())
    token, kv_token = 32 * 128 * 2, 8 * 128 * 2
    assert decode.cost.least == Work(32 * (token + 1024 * 2 * kv_token), 32 * token, 32 * 1024 * 4 * 32 * 128)
    assert prompt.cost.least == Work(1024 * (token + 2 * kv_token), 1024 * token, 1024 * 1025 // 2 * 4 * 32 * 128)
    assert decode.cost.least.bound(L4) == "memory" and prompt.cost.least.bound(L4) == "compute"


def test_a_linear_layer_by_hand() -> None:
    """4 bits in groups of 128: words, a scale of 2 bytes and a zero of 1 per group, x and the result."""
    (linear,) = (c for c in floors.cases("qwen3-8b", rows=(16,)) if c.linear == "down")
    assert (linear.inputs, linear.outputs) == (12_288, 4_096)
    weights = 12_288 * 4_096 * gptq_bytes_per_weight()
    assert linear.cost.least == Work(weights + 16 * 12_288 * 2, 16 * 4_096 * 2, 2 * 16 * 12_288 * 4_096)
    assert GPTQShape(256, 64, group_size=64).word_bytes == 256 * 64 // 2


@pytest.mark.parametrize("name", SHAPES)
def test_no_kernel_does_less_than_the_least(name: str) -> None:
    for case in floors.cases(name):
        does, least = case.cost.does, case.cost.least
        assert does.bytes >= least.bytes and does.written >= least.written and does.flops >= least.flops, case.name


def test_a_step_reads_what_the_simulator_says() -> None:
    """With tied embeddings the simulator's bytes; else only the tokens' rows of the embedding are read."""
    requests = [(1023, 1)] * 32
    for name in ("qwen3-0.6b", "qwen3-8b"):
        arch = shape_architecture(name)
        cost = CostModel(arch, H200, Calibration(1.0, 0.0, "peak rates")).step(requests, 32)
        unread = 0 if arch.tie_word_embeddings else (arch.vocab_size - 32) * arch.hidden_size * 2
        work = step_work(arch, requests)
        assert work.bytes == cost.bytes - unread and work.flops == cost.flops
        assert work.written == 32 * arch.kv_bytes_per_token(2)


def test_four_bits_are_saved_in_the_linear_layers_only() -> None:
    arch = shape_architecture("qwen3-8b")
    plain, packed = (floors.step_floors("qwen3-8b", batches=(1,))[name, 1] for name in ("bf16", "GPTQ"))
    weights = sum(inputs * outputs for inputs, outputs in linear_sizes(arch).values()) * arch.num_hidden_layers
    assert plain.bytes - packed.bytes == weights * (2 - gptq_bytes_per_weight()) and plain.flops == packed.flops


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "floors.json"
    monkeypatch.setattr(
        sys, "argv", ["gpu_floor.py", *f"--model tiny --gpu b200,l4 --kind write --json {file}".split()]
    )
    floors.main()
    assert "write 256" in capsys.readouterr().out
    rows = json.loads(file.read_text())["results"]
    assert {(row["gpu"], row["kind"]) for row in rows} == {(g, k) for g in ("b200", "l4") for k in ("write", "step")}
    written = next(row for row in rows if row["case"] == "write 256" and row["gpu"] == "l4")
    assert written["floor_s"] == 256 * (4 * 2 * 16 * 2 + 8) / L4.bandwidth
    monkeypatch.setattr(sys, "argv", ["gpu_floor.py", "--gpu", "h20"])
    with pytest.raises(SystemExit, match="did you mean 'h200'"):
        floors.main()


def test_what_bounds_a_case() -> None:
    gpus = {name: HARDWARE[name] for name in ("h200", "h100", "l4")}
    assert floors.bound_by(Work(read=1, flops=1), gpus) == "memory"
    assert floors.bound_by(Work(read=1, flops=250), gpus) == "memory, not on h200"
    assert [floors.scaled(n) for n in (12, 8_388_608, 2e12)] == ["12", "8.39 M", "2.00 T"]


def test_the_page_shows_what_the_script_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/dev/gpu_status.md").read_text(encoding="utf-8")
    command = re.search(r"^python scripts/dev/gpu_floor.py (.+?) +#", page, re.MULTILINE)
    assert command
    monkeypatch.setattr(sys, "argv", ["gpu_floor.py", *command[1].split()])
    floors.main()
    assert capsys.readouterr().out.strip() in page, (
        "docs/dev/gpu_status.md is out of date: paste what its command prints"
    )
