"""The cost model of the GPU kernels by hand, its floors, and the script that prints them (R4.60).

That the model names what the kernels really load and store is counted in test_triton_paged.py and, for M7's kernels,
in tests/m7/test_triton_gptq.py.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from folovllm.model_shapes import SHAPES, shape_architecture, shape_config
from folovllm.sim.cost import Calibration, CostModel
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.kernel_cost import (
    GPTQShape,
    Work,
    gptq_bytes_per_weight,
    linear_sizes,
    step_launches,
    step_work,
    weight_bytes,
)

pytest.importorskip("triton", reason="Triton is for Linux on x86-64")

from tests.gpu_engine import add, gpu_machine, step
from tests.script_loader import load_script

pytestmark = pytest.mark.m4

floors = load_script("gpu_floor")
H200, L4, RTX4090 = HARDWARE["h200"], HARDWARE["l4"], HARDWARE["rtx4090"]


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
    plain, packed = (found.least for found in floors.steps("qwen3-8b", batches=(1,)))
    weights = sum(inputs * outputs for inputs, outputs in linear_sizes(arch).values()) * arch.num_hidden_layers
    assert plain.bytes - packed.bytes == weights * (2 - gptq_bytes_per_weight()) and plain.flops == packed.flops


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "floors.json"
    monkeypatch.setattr(
        sys, "argv", ["gpu_floor.py", *f"--model tiny --gpu b200,l4 --kind write,step --json {file}".split()]
    )
    floors.main()
    printed = capsys.readouterr().out
    assert "write 256" in printed and "decode" not in printed.replace("a decode step", "")
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


def test_a_step_that_does_not_fit_has_no_speed() -> None:
    """Its floor would promise tokens per second that a GPU of this size never gives."""
    found = {step.name: step for step in floors.steps("qwen3-0.6b")}
    arch, large = shape_architecture("qwen3-0.6b"), found["bf16, batch 256"]
    assert large.memory == 2 * arch.num_parameters() + 256 * 1024 * arch.kv_bytes_per_token(2)
    cells = [floors.floor_cell(found[name], RTX4090) for name in ("bf16, batch 1", "bf16, batch 256")]
    assert cells == ["1.30 ms, 770/s", "does not fit"]
    assert floors.floor_cell(large, H200).endswith("39,313/s")
    rows = floors.as_json(["qwen3-0.6b"], ["step"], {"rtx4090": RTX4090})
    assert [(row["fits"], row["tok_per_s"] is None) for row in rows] == [(True, False)] * 4 + [(False, True)] * 2


def test_embeddings_are_not_quantised() -> None:
    arch = shape_architecture("qwen3-8b")
    assert weight_bytes(arch) == 2 * arch.num_parameters()
    assert weight_bytes(arch, 0) == 2 * (2 * 151_936 * 4096 + 36 * (2 * 4096 + 2 * 128) + 4096)  # and norms


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel or a copy: not views, and nothing that only allocates.

    A torch without CUDA has no fused RMSNorm and takes it apart; it counts as the one kernel that it is on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        if func.namespace == "aten" and "rms_norm" not in name:  # in inference mode, composite operators come whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        computes = func.namespace == "aten" and not func.is_view and ".empty" not in name
        if computes and any(t.device.type == "cuda" for t in tensors):
            self.names.append(name)
        return result


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize("shape", ["qwen3-0.6b", "llama-3.2-1b"])
def test_the_launches_of_a_decode_step(
    shape: str, num_requests: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On `triton_paged`, whatever the number of layers."""
    for num_layers in (1, 3):
        (tmp_path / "config.json").write_text(json.dumps(shape_config(shape) | {"num_hidden_layers": num_layers}))
        arch = dataclasses.replace(shape_architecture(shape), num_hidden_layers=num_layers)
        with monkeypatch.context() as patch, gpu_machine(patch) as machine:
            patch.setattr(torch.cuda, "mem_get_info", lambda *args: (2**30, 2**30))
            args = {"load_format": "dummy", "dtype": "bfloat16", "attention_backend": "triton_paged"}
            llm = machine.llm(tmp_path, num_kv_blocks=20, **args)
            for i in range(num_requests):
                add(llm, str(i), 3, max_tokens=4)
            step(llm)
            machine.kernels()
            with machine.gpu.step() as account, Launches() as launches:
                step(llm)
        assert len(launches.names) + len(machine.kernels()) + len(account.down) == step_launches(arch), launches.names


PAGE = (Path(__file__).parents[2] / "docs/dev/gpu_status.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python scripts/dev/gpu_floor.py (.+?) +#", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_shows_what_the_script_prints(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_floor.py", *command.split()])
    floors.main()
    assert capsys.readouterr().out.strip() in PAGE, "docs/dev/gpu_status.md is out of date: paste what it prints"


def test_the_page_has_two_commands() -> None:
    assert len(COMMANDS) == 2
