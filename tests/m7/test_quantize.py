"""The whole job: a model in, a checkpoint out, the tokens of its dequantised twin; interrupted, resumed, refused."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from folovllm import parts as parts_module
from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.no_cache import NoCacheBackend
from folovllm.entrypoints.cli import app
from folovllm.gptq_config import GPTQConfig
from folovllm.hf_config import load_hf_config
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.layers.quantization.quantized_linear import unpack_linear
from folovllm.model_executor.model_loader import load_model
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.quantize import output
from folovllm.quantize.dequantized import write_dequantized
from folovllm.quantize.gptq import GPTQ, Hessian, output_error
from folovllm.quantize.layerwise import (
    LayerRunner,
    TensorFolder,
    WholeSequenceBackend,
    bind_no_cache,
)
from folovllm.quantize.quantizer import QuantizeJob, QuantizeSettings, quantize_checkpoint
from scripts.dev.compare_gptqmodel import (
    bound,
    cut_model,
    distance,
    our_logits,
    quantize_ours,
    table_row,
    twin_of,
    write_twin,
)
from tests.m7.quant_helpers import FAMILIES, make_quantizable, quantize, random_windows

pytestmark = pytest.mark.m7

PARTS_OF_QUANTIZE = {"grid": "Grid", "packing": "Packing", "gptq": "GPTQ"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quantizable("Llama", tmp_path_factory.mktemp("plain") / "model")


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def model_of(folder: Path, quantization: str) -> LlamaForCausalLM:
    arch = load_hf_config(folder)
    model = load_model(folder, arch, torch.float32, torch.device("cpu"), quantization=quantization)
    bind_no_cache(model, arch)
    return model


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: list[int], count: int = 12) -> tuple[list[int], torch.Tensor]:
    """`count` tokens, recomputing everything for each, and the logits of the last."""
    from folovllm.forward_context import set_forward_context

    ids, logits = list(prompt), torch.empty(0)
    for _ in range(count):
        with set_forward_context(AttentionMetadata.single_sequence(len(ids))):
            hidden = model(torch.tensor(ids), torch.arange(len(ids)))
        logits = model.compute_logits(hidden[-1:])
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], logits


# --- End to end -------------------------------------------------------------------------------------------------------


OWN_PARTS = """
from folovllm.model_executor.layers.quantization.packing import Packing as _Packing
from folovllm.quantize.gptq import GPTQ as _GPTQ
from folovllm.quantize.grid import Grid as _Grid

calls = set()


class Grid(_Grid):
    @classmethod
    def find(cls, weight, config):
        calls.add("find")
        return super().find(weight, config)


class GPTQ(_GPTQ):
    def quantize(self, weight, hessian):
        calls.add("quantize")
        assert self.grid.__name__ == "Grid" and self.grid.__module__ == __name__, "the grid is the learner's, too"
        return super().quantize(weight, hessian)


class Packing(_Packing):
    def pack_rows(self, values):
        calls.add("pack_rows")
        return super().pack_rows(values)

    def unpack_rows(self, packed):
        calls.add("unpack_rows")
        return super().unpack_rows(packed)
"""


def test_parts_of_ones_own_quantise_and_load(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three parts in one file, for the job and then for the engine, packed and dequantised."""
    file = tmp_path / "own_parts.py"
    file.write_text(OWN_PARTS)
    parts = {f"quantize.{name}": f"{file}:{cls}" for name, cls in PARTS_OF_QUANTIZE.items()}
    loaded: list[Any] = []
    load_file_once = parts_module.load_file
    monkeypatch.setattr(parts_module, "load_file", lambda path: loaded.append(load_file_once(path)) or loaded[-1])
    settings = QuantizeSettings(GPTQConfig(4, 32), parts=parts)
    quantize_checkpoint(plain, tmp_path / "mine", settings, random_windows(), progress=False)
    assert set.union(*(module.calls for module in loaded)) == {"find", "quantize", "pack_rows"}
    expected = quantize(plain, tmp_path / "ours")
    for name, tensor in all_tensors(expected).items():
        assert torch.equal(all_tensors(tmp_path / "mine")[name], tensor), name
    for quantization in ("auto", "dequantize"):
        loaded.clear()
        arch, cpu = load_hf_config(expected), torch.device("cpu")
        options = {"quantization": quantization, "gptq_kernel": "dequant", "parts": parts}
        model = load_model(expected, arch, torch.float32, cpu, **options)
        model.model.layers[0].mlp.down_proj(torch.ones(1, arch.intermediate_size))
        assert [module.calls for module in loaded] == [{"unpack_rows"}], quantization


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"desc_act": True},
        {"bits": 3, "sym": False, "checkpoint_format": "gptq_v2"},
        {"bits": 8, "group_size": -1, "sym": False},
        {"bits": 2, "desc_act": True},
    ],
    ids=lambda config: "-".join(f"{key}={value}" for key, value in config.items()) or "default",
)
def test_a_quantised_model_gives_the_tokens_of_its_twin(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    """Three ways to the same numbers: packed, dequantised while loading, and a plain checkpoint of the same weights."""
    source = make_quantizable(family, tmp_path / "plain")
    folder = quantize(source, tmp_path / "gptq", **config)
    twin = write_dequantized(folder, tmp_path / "twin")
    assert load_hf_config(twin).quantization is None
    prompt = random_windows(1, 9, seed=3)[0]
    runs = [
        greedy(model_of(path, quantization), prompt)
        for path, quantization in ((folder, "auto"), (folder, "dequantize"), (twin, "auto"))
    ]
    assert len(set(runs[0][0])) > 1
    for tokens, logits in runs[1:]:
        assert tokens == runs[0][0] and torch.equal(logits, runs[0][1])
    original = greedy(model_of(source, "auto"), prompt)[1]
    assert not torch.allclose(original, runs[0][1], atol=1e-3)  # it really was quantised


def test_huggingface_gives_the_same_tokens_for_the_twin(plain: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = quantize(plain, tmp_path / "gptq", desc_act=True)
    hf = AutoModelForCausalLM.from_pretrained(write_dequantized(folder, tmp_path / "twin"), dtype=torch.float32)
    prompt = random_windows(1, 9, seed=5)[0]
    with torch.inference_mode():
        expected = hf(torch.tensor([prompt])).logits[0, -1]
    torch.testing.assert_close(greedy(model_of(folder, "auto"), prompt, 1)[1][0], expected, rtol=1e-4, atol=1e-4)


def test_the_engine_runs_a_quantised_checkpoint(plain: Path, tmp_path: Path) -> None:
    """quantization="dequantize", the off value of the switch."""
    from folovllm import LLM, SamplingParams

    folder = quantize(plain, tmp_path / "gptq", desc_act=True)
    twin = write_dequantized(folder, tmp_path / "twin")
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    texts = [
        [
            output.outputs[0].token_ids
            for output in LLM(str(path), quantization="dequantize").generate(["ab", "x"], params)
        ]
        for path in (folder, twin)
    ]
    assert texts[0] == texts[1]


def test_later_layers_are_fitted_to_quantised_inputs(plain: Path, tmp_path: Path) -> None:
    """Layer 1's down_proj again, by the means of the test alone: its inputs come through all that is before it."""
    config, windows = GPTQConfig(4, 32), random_windows()
    folder = quantize(plain, tmp_path / "gptq", windows)
    stored = all_tensors(folder)
    quantised, inputs = model_of(folder, "dequantize"), Hessian(96)
    down = quantised.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda module, args: inputs.add(args[0]))
    for window in windows:
        greedy(quantised, window, count=1)
    weight = all_tensors(plain)["model.layers.1.mlp.down_proj.weight"]
    expected = GPTQ(config).quantize(weight, inputs.matrix)
    prefix = "model.layers.1.mlp.down_proj."
    got = unpack_linear({name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}, config)
    assert (got.levels != expected.levels).float().mean() < 0.02  # sums in another order
    # Fitted to the unquantised model's inputs it would be another layer.
    other, hooked = model_of(plain, "auto"), Hessian(96)
    other.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: hooked.add(args[0]))
    for window in windows:
        greedy(other, window, count=1)
    assert (GPTQ(config).quantize(weight, hooked.matrix).levels != got.levels).float().mean() > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_in_turn_are_one_pass_through_the_layer(family: str, tmp_path: Path) -> None:
    """Names, order, inputs and result are those of the layer's own forward pass, to the last bit."""
    source = make_quantizable(family, tmp_path / "plain")
    runner = LayerRunner(TensorFolder(source), load_hf_config(source))
    layer, states, ran = runner.load_layer(0), runner.embed(random_windows(2)), []
    for name, module in layer.named_modules():
        if isinstance(module, LinearBase):
            module.register_forward_pre_hook(lambda module, args, name=name: ran.append((name, args[0])))
    expected = [runner.run(layer, hidden) for hidden in states]
    seen, ran = ran, []
    turns = [(name, linear, list(inputs)) for name, linear, inputs in runner.inputs_in_turn(layer, states)]
    assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
    assert [name for name, _, _ in turns] == [name for name, _ in seen[:4]] and len(seen) == 8
    for i, (name, linear, inputs) in enumerate(turns):
        assert dict(layer.named_modules())[name] is linear
        assert torch.equal(inputs[0], seen[i][1]) and torch.equal(inputs[1], seen[4 + i][1])


def test_a_changed_weight_is_what_follows(plain: Path) -> None:
    """The second layer's error is not hidden from the third: inputs come through what the caller has put there."""
    runner = LayerRunner(TensorFolder(plain), load_hf_config(plain))
    layer, states = runner.load_layer(0), runner.embed(random_windows(1))
    hidden = states[0].clone()
    for _, linear, _ in runner.inputs_in_turn(layer, states):
        linear.weight.data.mul_(0.5)
    assert torch.equal(states[0], runner.run(layer, hidden))


def test_fused_attention_is_the_textbook_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    spec = AttentionSpec(6, 2, 16, torch.float32, torch.device("cpu"), block_size=1)
    query, key, value = (torch.randn(33, heads, 16, generator=generator) for heads in (6, 2, 2))
    outputs = []
    for backend in (NoCacheBackend(spec), WholeSequenceBackend(spec)):
        backend.write(key, value, torch.empty(0), AttentionMetadata.single_sequence(33))
        outputs.append(backend.forward(query, torch.empty(0), AttentionMetadata.single_sequence(33)))
    torch.testing.assert_close(outputs[1], outputs[0])


def test_running_layers_leaves_the_states_alone(plain: Path) -> None:
    runner = LayerRunner(TensorFolder(plain), load_hf_config(plain))
    hidden, layer = runner.embed(random_windows(1))[0], runner.load_layer(0)
    before = hidden.clone()
    first, second = runner.run(layer, hidden), runner.run(layer, hidden)
    assert torch.equal(hidden, before) and torch.equal(first, second)


def test_one_layer_at_a_time_is_in_memory(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, layers = LayerRunner.load_layer, []

    def load_layer(self: LayerRunner, index: int) -> Any:
        assert all(earlier() is None for earlier in layers), "an earlier layer is still there"
        layer = real(self, index)
        layers.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(LayerRunner, "load_layer", load_layer)
    quantize(plain, tmp_path / "gptq")
    assert len(layers) == 2


def test_errors_are_reported_beside_rounding(plain: Path, tmp_path: Path) -> None:
    settings = QuantizeSettings(GPTQConfig(3, 32))
    errors = quantize_checkpoint(plain, tmp_path / "gptq", settings, random_windows(), progress=False)
    assert [entry.linear for entry in errors[:4]] == [
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert len(errors) == 8 and all(entry.error < entry.rtn_error for entry in errors)
    assert "GPTQ" in errors[0].summary() and "RTN" in errors[0].summary()
    log = json.loads((tmp_path / "gptq" / output.LOG).read_text())
    assert [entry["error"] for entry in log["linears"]] == [entry.error for entry in errors]
    # The first layer's error is what the definition says, on the weights that were written.
    runner = LayerRunner(TensorFolder(plain), load_hf_config(plain))
    layer, hessian = runner.load_layer(0), Hessian(64)
    for x in next(runner.inputs_in_turn(layer, runner.embed(random_windows())))[2]:
        hessian.add(x)
    twin = model_of(tmp_path / "gptq", "dequantize").model.layers[0].self_attn.qkv_proj.weight
    expected = output_error(layer.self_attn.qkv_proj.weight, twin, hessian.matrix)
    assert errors[0].error == pytest.approx(expected, rel=1e-3)


def test_rounding_to_nearest_needs_no_text(plain: Path, tmp_path: Path) -> None:
    settings = QuantizeSettings(GPTQConfig(4, 32), method="rtn")
    errors = quantize_checkpoint(plain, tmp_path / "rtn", settings, progress=False)
    assert {entry.error for entry in errors} == {None}
    weight = all_tensors(plain)["model.layers.1.self_attn.k_proj.weight"]
    twin = model_of(tmp_path / "rtn", "dequantize").model.layers[1].self_attn.qkv_proj.weight[64:96]
    steps = weight.view(32, 2, 32).abs().amax(-1) * 2 / 15  # [outputs, groups]
    # Half a step at most, but for the largest weight above: it lies a whole one beyond the last level.
    assert ((twin - weight).view(32, 2, 32).abs() <= steps[..., None] * 1.01).all()


# --- Interrupted ------------------------------------------------------------------------------------------------------


def test_an_interrupted_job_goes_on_after_the_last_finished_layer(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, windows = QuantizeSettings(GPTQConfig(4, 32, desc_act=True)), random_windows()
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    quantize_checkpoint(plain, whole, settings, windows, progress=False)
    real, begun = QuantizeJob._quantize_layer, []

    def stop_in_layer_1(self: QuantizeJob, layer: Any, index: int, *rest: Any) -> None:
        begun.append(index)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        real(self, layer, index, *rest)

    monkeypatch.setattr(QuantizeJob, "_quantize_layer", stop_in_layer_1)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plain, halves, settings, windows, progress=False)
    assert not (halves / "config.json").exists()  # half a model is no model
    assert not list(halves.glob("*.tmp"))
    errors = quantize_checkpoint(plain, halves, settings, windows, progress=False)
    assert begun == [0, 1, 1] and len(errors) == 8
    expected, got = all_tensors(whole), all_tensors(halves)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert (halves / "config.json").read_text() == (whole / "config.json").read_text()


def test_an_unfinished_folder_keeps_its_settings(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.OutputFolder, "finish", lambda self, *args: None)
    quantize(plain, tmp_path / "gptq")
    for change in ({"bits": 8}, {"group_size": -1}, {"desc_act": True}):
        with pytest.raises(ValueError, match=r"begun with other settings \(config\): repeat that command"):
            quantize(plain, tmp_path / "gptq", **change)
    with pytest.raises(ValueError, match=r"other settings \(calibration\)"):
        quantize(plain, tmp_path / "gptq", random_windows(seed=1))


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_folders_that_hold_something_else(plain: Path, tmp_path: Path) -> None:
    done = quantize(plain, tmp_path / "gptq")
    with pytest.raises(ValueError, match="holds a finished model: name a new folder"):
        quantize(plain, done)
    with pytest.raises(ValueError, match="is not empty: name a new folder"):
        quantize(plain, plain)
    with pytest.raises(ValueError, match="quantised already: quantise the model it was made from"):
        quantize(done, tmp_path / "twice")
    with pytest.raises(ValueError, match="is not quantised: it is its own twin"):
        write_dequantized(plain, tmp_path / "twin")


def test_damaged_files(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: name a new folder"):
        quantize(plain, tmp_path / "file")
    source = shutil.copytree(plain, tmp_path / "source")
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"expected a whole safetensors file; found .*safetensors of .* download"):
        quantize(source, tmp_path / "gptq")
    monkeypatch.setattr(output.OutputFolder, "finish", lambda self, *args: None)
    quantize(plain, tmp_path / "log")
    (tmp_path / "log" / output.LOG).write_text('{"settings": {}}')
    with pytest.raises(ValueError, match=r"quantize_log.json is damaged or of another version: name a new folder"):
        quantize(plain, tmp_path / "log")


@pytest.mark.parametrize(
    "config,message",
    [
        ({"group_size": 128}, r"group_size=128 does not divide all input sizes .*\(64, 96\); use 32, -1"),
        ({"group_size": 64}, r"use 32, -1 \(-1: one group per output\)"),
        ({"bits": 5}, "bits of 2, 3, 4, 8; found 5"),
    ],
)
def test_sizes_that_do_not_fit(plain: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(plain, tmp_path / "gptq", **config)
    assert not (tmp_path / "gptq").exists()


def test_three_bits_need_multiples_of_32(tiny_model_dir: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"32 values at a time.*\(24, 56, 72, 168\); use another number of bits"):
        quantize(tiny_model_dir("llama"), tmp_path / "gptq", bits=3, group_size=-1)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"method": "awq"}, "method must be one of gptq, rtn; got 'awq'"),
        ({"damp": -0.1}, "damp must be between 0 and 1"),
        ({"method": "rtn", "config": GPTQConfig(4, desc_act=True)}, "drop --desc-act"),
        ({"method": "rtn", "static_groups": True}, "drop --static-groups"),
    ],
)
def test_settings_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeSettings(**{"config": GPTQConfig(4), **arguments})


def test_gptq_needs_calibration(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs calibration sequences"):
        quantize_checkpoint(plain, tmp_path / "gptq", QuantizeSettings(GPTQConfig(4, 32)), [], progress=False)


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command(plain: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All is well that ends well. " * 40)
    arguments = ["quantize", str(plain), str(tmp_path / "gptq"), "--group-size", "32", "--asym", "--calib", str(text)]
    result = CliRunner().invoke(app, [*arguments, "--samples", "4", "--seq-len", "32"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    assert "8 linear layers in" in words and "mean error of an output" in words and "the checkpoint is in" in words
    expected = GPTQConfig(4, 32, sym=False, checkpoint_format="gptq_v2")
    assert load_hf_config(tmp_path / "gptq").quantization == expected
    quiet = CliRunner().invoke(
        app, ["quantize", str(plain), str(tmp_path / "rtn"), "--method", "rtn", "--group-size", "-1", "-q"]
    )
    assert quiet.exit_code == 0 and quiet.output == ""


@pytest.mark.parametrize(
    "options,message",
    [
        (["--group-size", "48"], "--group-size must be one of 32, 64, 128, -1; got 48"),
        ([], "group_size=64 does not divide"),
        (["--bits", "5"], "bits of 2, 3, 4, 8"),
        (["--group-size", "32", "--calib", "nowhere.txt"], "cannot read the text 'nowhere.txt'"),
        (["--group-size", "32", "--checkpoint-format", "awq"], "checkpoint_format of gptq, gptq_v2"),
    ],
)
def test_the_command_refuses(plain: Path, tmp_path: Path, options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["quantize", str(plain), str(tmp_path / "gptq"), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_the_command_interrupted(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 130, and a line that says how to go on; the same command then does."""
    command = [
        "quantize",
        str(plain),
        str(tmp_path / "gptq"),
        "--group-size",
        "32",
        "--samples",
        "2",
        "--seq-len",
        "32",
    ]
    real, begun = QuantizeJob._quantize_layer, []

    def stop_in_layer_1(self: QuantizeJob, layer: Any, index: int, *rest: Any) -> None:
        begun.append(index)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        real(self, layer, index, *rest)

    monkeypatch.setattr(QuantizeJob, "_quantize_layer", stop_in_layer_1)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    assert "the same command goes on after the last finished layer" in " ".join(result.output.split())
    assert CliRunner().invoke(app, command).exit_code == 0 and begun == [0, 1, 1]
    log = json.loads((tmp_path / "gptq" / output.LOG).read_text())
    assert sum(log["parts"].values()) <= log["seconds"] and log["peak_memory_bytes"] > 2**20


def test_the_source_is_copied_but_for_its_weights(plain: Path, tmp_path: Path) -> None:
    source = shutil.copytree(plain, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    folder = quantize(source, tmp_path / "gptq")
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert sorted(name for name in names if name.endswith(".safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == all_tensors(folder).keys()


def test_the_comparison_with_gptqmodel_cuts_models(plain: Path, tmp_path: Path) -> None:
    """scripts/dev/compare_gptqmodel.py, as far as it goes without GPTQModel."""
    cut = cut_model(plain, tmp_path / "cut", 1)
    assert load_hf_config(cut).num_hidden_layers == 1
    assert {tensor.dtype for tensor in all_tensors(cut).values()} == {torch.float16}
    quantize_ours(cut, tmp_path / "ours", {"bits": 4, "group_size": 32}, random_windows())
    probe = random_windows(1)[0]
    assert write_twin(tmp_path / "ours") is None
    ours, twin = (our_logits(folder, probe) for folder in (tmp_path / "ours", twin_of(tmp_path / "ours")))
    assert torch.equal(ours, twin) and ours.shape == (48, 264)
    assert distance(ours, ours) == 0.0 and distance(ours + twin.std(), twin) == pytest.approx(1.0, rel=1e-4)
    assert "is not quantised" in write_twin(plain)
    assert 1e-6 < bound(load_hf_config(cut)) < bound(load_hf_config(plain)) < 1e-4


@pytest.mark.parametrize(
    "found,equal",
    [
        ({"weights": 0.0}, "yes"),
        ({"weights": 1e-9}, "no"),
        ({"weights": 0.0, "gptqmodel": 2e-4}, "no"),
        ({"weights": 0.0, "transformers": "ValueError: no"}, "no"),
        ({}, "no"),
    ],
)
def test_what_counts_as_equal(found: dict[str, Any], equal: str) -> None:
    distances = {"folovllm": 1e-6, "gptqmodel": 1e-6, "transformers": 1e-6, **found}
    assert table_row("4 bits", "ours", distances, limit=1e-4)["equal"] == equal


def test_settings_without_parts_are_those_of_an_earlier_version():
    """A job that an earlier version began has no "parts" in its settings, and can be resumed."""
    assert "parts" not in QuantizeSettings(GPTQConfig(4, 32)).to_json()
    parts = {"quantize.grid": "mine.py:Grid"}
    assert QuantizeSettings(GPTQConfig(4, 32), parts=parts).to_json()["parts"] == parts
