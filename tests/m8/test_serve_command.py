"""The command line of `folovllm serve`: options from the config dataclasses, vLLM's other options, and its help."""

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm.config import DEFAULT_MODEL, EngineConfig, engine_arg_names
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands.serve_options import make_parser, parse_command
from folovllm.entrypoints.commands.vllm_serve_args import VLLM_SERVER_ARGS
from folovllm.entrypoints.field_comments import field_comments
from folovllm.entrypoints.openai.server_options import ServerOptions
from folovllm.vllm_args import VLLM_ARGS

pytestmark = pytest.mark.m8


def config_of(*argv: str) -> EngineConfig:
    command = parse_command(argv)
    return EngineConfig.from_args(preset=command.preset, without=command.without, **command.engine_args)


def option_names() -> set[str]:
    return {name for action in make_parser()._actions for name in action.option_strings}


# ---- one source of truth


def test_every_engine_argument_and_every_field_of_the_server_is_an_option() -> None:
    names = set(engine_arg_names()) - {"parts"} | {field.name for field in dataclasses.fields(ServerOptions)}
    missing = {f"--{name.replace('_', '-')}" for name in names} - option_names()
    assert not missing


def test_every_option_has_a_text() -> None:
    for action in make_parser()._actions:
        assert action.help, action.option_strings


def test_comments_are_read_from_the_source() -> None:
    comments = field_comments(ServerOptions)
    assert list(comments) == [field.name for field in dataclasses.fields(ServerOptions)]
    assert comments["port"].startswith("the port to listen on; 0:")


def test_without_options_the_server_is_the_newest_engine_with_statistics() -> None:
    command = parse_command([])
    assert command.options == ServerOptions()
    assert config_of() == EngineConfig.from_args(model=DEFAULT_MODEL, disable_log_stats=False)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--max-num-seqs", "8"], {"max_num_seqs": 8}),
        (["--max-num-seqs=8"], {"max_num_seqs": 8}),
        (["--max_num_seqs", "8"], {"max_num_seqs": 8}),
        (["--max-model-len", "2k"], {"max_model_len": 2000}),
        (["--max-model-len", "2K"], {"max_model_len": 2048}),
        (["--kv-cache-memory", "1.5g"], {"kv_cache_memory": 1_500_000_000}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--enable-prefix-caching"], {"enable_prefix_caching": True}),
        (["--disable-log-stats"], {"disable_log_stats": True}),
        (["--dtype", "float32"], {"dtype": "float32"}),
        (["--fused-ops", "false"], {"fused_ops": False}),
        (["--fused-ops", "auto"], {"fused_ops": "auto"}),
        (["--block-size", "32"], {"block_size": 32}),
        (["--gpu-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["--hf-overrides", '{"rope_theta": 5}'], {"hf_overrides": {"rope_theta": 5}}),
        (["--served-model-name", "a", "--served-model-name", "b"], {"served_model_name": ["a", "b"]}),
        (["-q", "auto"], {"quantization": "auto"}),
        (["--engine-arg", "seed=5"], {"seed": 5}),
        (["-tp", "2", "-pp", "3"], {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}),
        (["--tensor_parallel_size=2"], {"tensor_parallel_size": 2}),
        (["--part", "core.scheduler=m.py:S"], {"parts": {"core.scheduler": "m.py:S"}}),
        (["--model", "./x"], {"model": "./x"}),
        (["./x"], {"model": "./x"}),
        (["./x", "--model", "./x"], {"model": "./x"}),
        (["./x", "--served-model-name", "a", "b", "--seed", "5"], {"served_model_name": ["a", "b"], "seed": 5}),
    ],
)
def test_options_become_engine_arguments(argv: list[str], expected: dict[str, Any]) -> None:
    args = parse_command(argv).engine_args
    assert {name: args[name] for name in expected} == expected
    assert len(args) == len(expected | {"model": "", "disable_log_stats": False}), "nothing else is set"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--port", "0"], {"port": 0}),
        (["--api-key", "a", "--api-key", "b"], {"api_key": ("a", "b")}),
        (["./x", "--api-key", "a", "b"], {"api_key": ("a", "b")}),
        (["--allowed-origins", '["https://a.org", "https://b.org"]'], {"allowed_origins": ("https://a.org", "https://b.org")}),
        (["--allowed-origins", "*"], {"allowed_origins": ("*",)}),
        (["--log-requests"], {"log_requests": True}),
        (["--enable-log-requests"], {"log_requests": True}),
        (["--max-body-size", "1M"], {"max_body_size": 2**20}),
        (["--shutdown-timeout", "0.5"], {"shutdown_timeout": 0.5}),
        (["--chat-template", "{{ messages }} --x"], {"chat_template": "{{ messages }} --x"}),
        (["--chat-template", "--x"], {"chat_template": "--x"}),
    ],
)  # fmt: skip
def test_options_become_server_options(argv: list[str], expected: dict[str, Any]) -> None:
    assert parse_command(argv).options == ServerOptions(**expected)


def test_a_preset_and_without() -> None:
    assert config_of("--preset", "m3").cache_config.enable_prefix_caching is False
    assert config_of("--without", "m6").cache_config.enable_prefix_caching is False


# ---- what is refused, before anything is loaded


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-num-seq", "8"], "there is no option --max-num-seq; did you mean '--max-num-seqs'?"),
        (["--frobnicate"], "there is no option --frobnicate"),
        (["-x"], "there is no option -x"),
        (["--max-num-seqs", "many"], "--max-num-seqs: must be a whole number such as 4096 or 4K, got 'many'"),
        (["--max-num-seqs", "0"], "max_num_seqs must be between 1"),
        (["--max-num-seqs"], "--max-num-seqs: expected one argument"),
        (["--port", "70000"], "port must be between 0 and 65535"),
        (["--dtype", "float8"], "dtype must be one of"),
        (["--hf-overrides", "rope"], "must be a JSON object"),
        (["--hf-overrides.rope_theta", "5"], "write the value as JSON, --hf-overrides '{\"rope_theta\": ...}'"),
        (["--allowed-origins", "[1]"], "--allowed-origins takes"),
        (["--api-key", ""], "api_key must be printable"),
        (["--shutdown-timeout", "nan"], "shutdown_timeout must be a finite number"),
        (["--uvicorn-log-level", "loud"], "uvicorn_log_level must be one of"),
        (["a", "b"], "unrecognized arguments: b"),
        (["a", "--model", "b"], "two models are given, a and b"),
        (["--seed", "1", "--engine-arg", "seed=2"], "seed is given twice"),
        (["--part", "core.nothing=m.py:S"], "unknown part 'core.nothing'"),
        (["--preset", "m99"], "m99"),
        (["--decoder-stack", "true", "--linear-backend", "torch"], "decoder_stack=True needs"),
    ],
)
def test_a_wrong_option_is_refused_with_what_to_do(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_command(argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["--decode-context-parallel-size", "1"],
        ["--decode_context_parallel_size=1"],
        ["-dcp", "1"],
        ["-n", "1"],
        ["--node-rank", "0"],
        ["--trust-remote-code"],
        ["--no-enable-lora"],
        ["--disable-custom-all-reduce"],
        ["--swap-space", "4"],
        ["--enable-request-id-headers"],
        ["--max-log-len", "100"],
        ["--guided-decoding-backend", "auto"],
    ],
)
def test_an_option_of_vllm_that_changes_nothing_is_accepted(argv: list[str]) -> None:
    """Wherever it stands, it takes neither the model nor the option that follows."""
    for line in ([*argv, "./x"], ["./x", *argv], [*argv, "--seed", "5", "./x"]):
        assert parse_command(line).engine_args["model"] == "./x"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--enable-expert-parallel"], "--enable-expert-parallel is an option of vLLM that FoloVLLM does not have"),
        (["-dcp", "2"], "-dcp 2 is an option of vLLM that FoloVLLM does not have"),
        (["-dpl", "1"], "-dpl 1 is an option of vLLM that FoloVLLM does not have; data_parallel_size engines run on"),
        (["-dpe"], "-dpe is an option of vLLM"),
        (["--nnodes", "2"], "--nnodes 2 is an option of vLLM that FoloVLLM does not have; several machines"),
        (["-r", "1"], "joined through Ray"),
        (["--enable-auto-tool-choice"], "tool_choice='none'"),
        (["--ssl-keyfile", "key.pem"], "reverse proxy"),
        (["--enable-lora"], "merge the adapter"),
        (["--kv-cache-dtype", "fp8"], "dtype"),
        (["--api-server-count", "4"], "load balancer"),
        (["--compilation-config.level", "3"], "eagerly"),
        (["-O3"], "eagerly"),
        (["--speculative-config", "{}"], "speculative decoding is not built yet"),
        (["--config", "c.yaml"], "command line"),
    ],
)
def test_another_option_of_vllm_is_refused_with_the_alternative(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_command([*argv])
    assert message in str(caught.value)


@pytest.mark.parametrize("option", ["--tp", "--tp-size", "--tp_size", "--tensor-parallel"])
def test_short_forms_are_suggested_in_full(option: str) -> None:
    """`serve --tp 2` was answered with "did you mean '--dtype'?"."""
    with pytest.raises(ValueError, match="did you mean '--tensor-parallel-size'"):
        parse_command([option, "2"])


def test_short_forms_with_one_dash_are_options() -> None:
    args = parse_command(["-tp", "2", "-pp=3", "-dp", "4", "-dpb", "ray"]).engine_args
    names = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "data_parallel_backend")
    assert [args[name] for name in names] == [2, 3, 4, "ray"]


def test_no_option_of_ours_is_answered_as_vllms() -> None:
    ours = {name.removeprefix("--").replace("-", "_") for name in option_names()}
    assert not ours & (set(VLLM_SERVER_ARGS) | set(VLLM_ARGS))


# ---- the command


def serve(*argv: str, columns: int = 80) -> Any:
    return CliRunner().invoke(app, ["serve", *argv], env={"COLUMNS": str(columns)})


@pytest.mark.parametrize("columns", [80, 120])
def test_the_help_is_grouped_and_fits_the_terminal(columns: int) -> None:
    result = serve("--help", columns=columns)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "positional arguments:", "options:", "Server:", "ModelConfig:", "CacheConfig:", "SchedulerConfig:",
        "AttentionConfig:", "KernelConfig:", "QuantizationConfig:", "ParallelConfig:", "EngineConfig:", "FoloVLLM:",
    ]  # fmt: skip
    assert max(map(len, lines)) <= columns
    assert (
        "--[no-]enable-prefix-caching" in result.stdout and "--no-enable" not in result.stdout.partition("Server:")[2]
    )


def test_help_for_one_word_or_one_group() -> None:
    result = serve("--help=prefix")
    assert result.exit_code == 0
    assert "--[no-]enable-prefix-caching" in result.stdout and "--port" not in result.stdout
    result = serve("--help=SchedulerConfig")
    assert "--max-num-seqs" in result.stdout and "--port" not in result.stdout
    result = serve("--help=nothing-like-it")
    assert result.exit_code == 2 and "SchedulerConfig" in result.stderr


def test_a_wrong_option_is_one_line_on_stderr() -> None:
    result = serve("--max-num-seq", "8")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: there is no option --max-num-seq; did you mean '--max-num-seqs'?\n"


def test_options_are_read_without_the_web_framework_and_torch() -> None:
    """A wrong option is answered at once."""
    script = (
        "import sys; from folovllm.entrypoints.commands.serve_options import parse_command; parse_command([]);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'fastapi', 'uvicorn', 'tokenizers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_server_without_its_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("folovllm.entrypoints.commands.serve.NEEDED", ("fastapi", "no_such_package"))
    result = serve()
    assert result.exit_code == 2 and "pip install 'folovllm[serve]'" in result.stderr
