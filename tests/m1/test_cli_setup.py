"""The commands that need no engine: help, pull, info; the options; and how errors end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from folovllm import __version__, milestones
from folovllm.csrc.build import load_ops
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands.options import EngineOptions, SamplingOptions, parse_engine_args

pytestmark = pytest.mark.m0

COMMANDS = ("generate", "chat", "demo", "pull", "info", "bench")


def run(*args, **kwargs):
    return CliRunner().invoke(app, [str(a) for a in args], **kwargs)


def test_help_lists_every_command_and_shows_examples():
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout
    assert 'folovllm generate "The capital of France is"' in result.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "bench"])
def test_every_command_explains_itself_with_an_example(command):
    result = run(command, "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"folovllm {command}" in result.stdout and "--debug" in result.stdout


@pytest.mark.parametrize("command", ["generate", "chat", "demo"])
def test_engine_options_are_the_same_everywhere(command):
    text = run(command, "--help", env={"COLUMNS": "200"}).stdout
    for option in (
        "model",
        "preset",
        "without",
        "dtype",
        "device",
        "max-model-len",
        "seed",
        "download-dir",
        "engine-arg",
    ):
        assert f"--{option}" in text


def test_help_imports_neither_torch_nor_transformers():
    script = (
        "import sys; from folovllm.entrypoints.cli import app; app(['generate', '--help'], standalone_mode=False);"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "folovllm", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"folovllm {__version__}")


def test_no_arguments_show_the_help():
    result = run()
    assert "generate" in result.output and result.exit_code == 2


# command line, part of the one line that it must answer with
WRONG = [
    (["generate"], "no prompt: give one or more texts"),
    (["generate", "-", "-"], "can be read only once"),
    (["generate", "--prompts-file", "./nosuch.txt"], "--prompts-file ./nosuch.txt: [Errno 2]"),
    (["generate", "-", "--prompts-file", "-"], "can be read only once"),
    (["generate", "hi", "--model", "nosuch"], "unknown model 'nosuch'"),
    (["generate", "hi", "--model", "./no/such/folder"], "no model at no/such/folder"),
    (["generate", "hi", "--model", ""], "model must not be empty"),
    (["generate", "hi", "--preset", "m99"], "unknown milestone 'm99'; the ladder has m0"),
    (["generate", "hi", "--preset", "m0"], "there is no engine before m1"),
    (["generate", "hi", "--without", "m99"], "unknown milestone 'm99'"),
    (["generate", "hi", "--dtype", "int8"], "dtype must be one of auto, float32"),
    (["generate", "hi", "--device", "tpu"], "device must be one of"),
    (["generate", "hi", "--max-model-len", "1"], "max_model_len must be at least 2"),
    (["generate", "hi", "--engine-arg", "blok_size=16"], "did you mean 'block_size'?"),
    (["generate", "hi", "--engine-arg", "block_size"], "--engine-arg takes NAME=VALUE"),
    (["generate", "hi", "--engine-arg", "preset=m1"], "write --preset m1"),
    (["generate", "hi", "--engine-arg", "seed=1", "--seed", "2"], "seed is given twice"),
    (["generate", "hi", "--engine-arg", "seed=1", "--engine-arg", "seed=2"], "seed is given twice"),
    (["generate", "hi", "--temperature", "-1"], "temperature must be in [0, inf)"),
    (["generate", "hi", "--top-p", "1.5"], "top_p must be in (0, 1]"),
    (["generate", "hi", "--max-tokens", "0"], "max_tokens must be at least 1"),
    (["generate", "hi", "--stop", ""], "stop must hold non-empty strings"),
    (["chat", "--model", "nosuch"], "unknown model 'nosuch'"),
    (["chat", "--min-p", "2"], "min_p must be in [0, 1]"),
    (["demo", "--model", "nosuch"], "unknown model 'nosuch'"),
    (["demo", "--dtype", "bfloat16"], "compares tokens in float32"),
    (["pull", "smollm"], "did you mean 'smollm2-135m'?"),
    (["info", "nosuch"], "unknown model 'nosuch'"),
]


@pytest.mark.parametrize("args, message", WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_what_the_user_can_mend_is_one_line_on_stderr(args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("args", [["--debug", "info", "nosuch"], ["info", "nosuch", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(args):
    result = run(*args)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: unknown model")


@pytest.mark.parametrize(
    "args", [["generate", "hi", "--max-tokns", "3"], ["nosuch"], ["generate", "--seed", "x", "hi"]]
)
def test_a_wrong_option_is_a_usage_error(args):
    result = run(*args)
    assert result.exit_code == 2 and "Usage:" in result.stderr and result.stdout == ""


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("folovllm.hub.pull", lambda *a, **k: 1 / 0)
    assert isinstance(run("pull").exception, ZeroDivisionError)


def test_ctrl_c_exits_with_130(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("folovllm.hub.pull", interrupted)
    result = run("pull")
    assert result.exit_code == 130 and "Traceback" not in result.output


def test_ctrl_c_while_the_commands_are_imported_is_quiet():
    script = (
        "import sys, folovllm.__main__ as entry\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'folovllm.entrypoints.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "entry.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "folovllm", "docs", "list", "03"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: the output: No space left on device\n")


def test_engine_args_are_read_as_python_would():
    items = [
        "block_size=32",
        "gpu-memory-utilization=0.5",
        "enforce_eager=true",
        "max_num_seqs=None",
        "batching=static",
    ]
    assert parse_engine_args([*items, "model=a=b"]) == {
        "block_size": 32,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "max_num_seqs": None,
        "batching": "static",
        "model": "a=b",
    }


def test_engine_options_leave_out_what_was_not_given():
    options = EngineOptions(seed=0, preset="m1", engine_arg=["block_size=8"])
    assert options.engine_args() == {"seed": 0, "block_size": 8}
    assert options.engine_args(seed=5, dtype="float32") == {"seed": 0, "block_size": 8, "dtype": "float32"}


def test_sampling_options_stand_over_the_defaults_of_the_command():
    params = SamplingOptions(top_k=5, sampling_seed=3, stop=["a", "b"]).sampling_params(temperature=0.5, top_k=9)
    assert (params.top_k, params.seed, params.stop, params.temperature) == (5, 3, ["a", "b"], 0.5)


def test_pull_prints_the_folder_and_quiet_prints_nothing(monkeypatch, tmp_path):
    calls = []

    def fake(name, download_dir, progress, force):
        calls.append((name, download_dir, progress, force))
        return tmp_path

    monkeypatch.setattr("folovllm.hub.pull", fake)
    assert run("pull").stdout.strip() == str(tmp_path)
    assert run("pull", "org/name", "--quiet", "--force", "--download-dir", "x").output == ""
    assert calls == [("smollm2-135m", None, True, False), ("org/name", "x", False, True)]


def test_info_shows_hardware_models_and_the_ladder(tmp_path):
    facts = json.loads(run("info", "--json", "--download-dir", tmp_path).stdout)
    assert facts["folovllm"] == __version__ and facts["threads"] >= 1 and facts["memory_bytes"] > 0
    assert facts["models"][0]["name"] == "smollm2-135m" and facts["models"][0]["pulled"] is False
    kernels = facts["cpp_kernels"]
    assert kernels["cpu_isa"][0] == "native" and kernels["cpu_isa"][-1] == "portable" and kernels["library"]
    assert [m["id"] for m in facts["milestones"]] == list(milestones.RUNG_IDS)
    assert facts["top_milestone"] == milestones.top_rung().id
    text = run("info", "--download-dir", tmp_path).stdout
    assert "not pulled" in text and "Basic inference" in text and " GiB" in text


def test_info_says_what_runs(tiny_model_dir):
    """--engine loads the model; with options of the engine, but without --engine, there is nothing to say."""
    folder = tiny_model_dir("llama")
    small = ["--max-model-len", "64", "--engine-arg", "kv_cache_memory=1048576"]
    facts = json.loads(run("info", folder, "--engine", "--json", "--preset", "m3", *small).stdout)
    assert facts["attention"] == "torch_naive" and facts["sampler"] == "Sampler, torch" and facts["replaced"] == []
    assert "2 x QKVParallelLinear: UnquantizedLinearMethod" in facts["layers"] and facts["threads"] >= 1
    text = run("info", folder, "--engine", "--preset", "m3", *small).stdout
    assert "2 x LlamaDecoderLayer: module by module" in text and re.search(r"replaced +none", text)
    limited = run("info", folder, "--engine", "--json", "--engine-arg", "cpu_isa=portable", *small)
    if load_ops("portable") is not None:
        assert json.loads(limited.stdout)["C++ kernels"].startswith("cpu_isa='portable', compiled for")
    assert run("info", folder, "--preset", "m3").exit_code != 0
    assert run("info", folder, "--model", "other").exit_code != 0


def test_info_of_a_model_counts_parameters_and_kv_bytes(tiny_model_dir):
    from safetensors import safe_open

    folder = tiny_model_dir("llama")
    facts = json.loads(run("info", folder, "--json").stdout)
    with safe_open(Path(folder) / "model.safetensors", "pt") as weights:
        elements = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert facts["num_parameters"] == elements
    assert facts["kv_bytes_per_token"]["float32"] == 2 * 2 * 1 * 24 * 4  # K and V, 2 layers, 1 KV head of 24
    text = run("info", folder).stdout
    assert "LlamaForCausalLM" in text and f"{elements:,}" in text


def test_bench_passes_everything_on(monkeypatch):
    seen = []
    monkeypatch.setattr("folovllm.benchmarks.command.main", lambda argv: seen.append(argv) or 3)
    result = run("bench", "--workload", "A", "--help", "-x", "milestones")
    assert seen == [["--workload", "A", "--help", "-x", "milestones"]] and result.exit_code == 3
