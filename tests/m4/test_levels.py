"""The levels of the C++ library: flags, refusals, a namespace each, and an engine that gives the same tokens on all.

Milestone: M4. The compilers here are shell scripts that refuse some flags (test_csrc_build.py).
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from folovllm import LLM, SamplingParams, platforms
from folovllm.config import KernelConfig
from folovllm.csrc import build as builder
from folovllm.csrc import compilers, levels
from tests.m4.test_csrc_build import fake_compiler

pytestmark = pytest.mark.m4

# ---- what compilers accept


def flags_of(tmp_path: Path, isa: str, refused: str = "nothing") -> list[str]:
    compiler, _ = fake_compiler(tmp_path, 0, refused)
    return builder.compile_flags(compilers.Compiler(str(compiler), tmp_path), isa)


@pytest.fixture
def x86(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX2 and without AVX-512."""
    monkeypatch.setattr(levels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(levels.torch.cpu, "get_capabilities", lambda: dict.fromkeys(levels.AVX2, True))


def test_a_level_has_its_flags_and_its_namespace(x86: None, tmp_path: Path) -> None:
    assert flags_of(tmp_path, "native") == [*builder.FLAGS, "-march=native", "-fno-gnu-unique"]
    limited = [*builder.FLAGS, "-march=x86-64-v3", "-fno-gnu-unique", "-mtune=native", "-Dfolovllm=folovllm_avx2"]
    assert flags_of(tmp_path, "avx2") == limited
    assert "-march=x86-64" in flags_of(tmp_path, "portable")


def test_flags_that_a_compiler_refuses_are_left_out_or_replaced(
    x86: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """clang has no -fno-gnu-unique, and an Apple clang may lack -mcpu=native."""
    assert flags_of(tmp_path, "native", "-fno-gnu-unique") == [*builder.FLAGS, "-march=native"]
    monkeypatch.setattr(levels.platform, "machine", lambda: "arm64")
    assert "-mcpu=native" in flags_of(tmp_path, "native")
    assert "-mcpu=apple-m1" in flags_of(tmp_path, "native", "-mcpu=native")


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("-std=c++20", r"does not compile with -std=c\+\+20 .*, which FoloVLLM needs; install a newer one"),
        ("-march=x86-64-v3", r"does not accept -march=x86-64-v3, which cpu_isa='avx2' needs"),
    ],
)
def test_flags_that_must_be_there_are_named(refused: str, message: str, x86: None, tmp_path: Path) -> None:
    with pytest.raises(compilers.BuildError, match=message) as error:
        flags_of(tmp_path, "avx2", refused)
    assert f"I do not know {refused}" in str(error.value)


@pytest.mark.parametrize(
    ("system", "tool", "command"),
    [
        ("Linux", "apt-get", "apt-get install g++"),
        ("Linux", "pacman", "pacman -S gcc"),
        ("Linux", "apk", "apk add g++"),
        ("Linux", "nix", "g++ 11 or clang 14"),
        ("Darwin", "brew", "xcode-select --install"),
        ("Windows", "winget", "use WSL"),
    ],
)
def test_the_package_of_a_compiler_is_named(
    system: str, tool: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers.platform, "system", lambda: system)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == tool else None)
    assert command in compilers.how_to_install()


def test_a_level_that_this_cpu_lacks_names_what_is_missing(x86: None) -> None:
    assert levels.levels_here() == ["native", "avx2", "portable"]
    with pytest.raises(ValueError, match=r"avx512' needs avx512_f, .*, which this CPU lacks.*'avx2'"):
        builder.load_ops("avx512")


def test_a_level_of_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels.platform, "machine", lambda: "aarch64")
    assert levels.levels_here() == ["native", "portable"]
    with pytest.raises(ValueError, match="'avx2' is no level of aarch64 processors: use one of 'native', 'portable'"):
        builder.build(Path("never"), isa="avx2")


def test_each_level_has_a_library_of_its_own(isa: str, ops: Any) -> None:
    """Both namespaces are there at once, and each level was compiled for its own instructions."""
    assert ops is builder.load_ops(isa)
    assert ops is not builder.load_ops("portable" if isa == "native" else "native")
    assert f"classes.{ops.name}.DecoderStack" in str(ops.decoder_stack.default._schema)
    features = builder.compiled_for(ops)
    if isa == "avx2":
        assert {"avx2", "fma", "f16c"} <= features and "avx512f" not in features
    if isa == "portable":
        assert features <= {"neon"}


# ---- what an engine makes of them


def test_an_engine_gives_the_same_tokens_at_every_level(isa: str, tiny_model_dir: Any) -> None:
    """In float32, with all kernels on: from linears to sampling everything runs at the level that was asked for."""
    prompts = [{"prompt_token_ids": list(range(1, n))} for n in (3, 20, 40)]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def tokens(**arguments: Any) -> list[list[int]]:
        llm = LLM(str(tiny_model_dir("llama")), dtype="float32", max_model_len=64, kv_cache_memory=2**20, **arguments)
        if "cpu_isa" in arguments:
            assert llm.describe()["C++ kernels"].startswith(f"cpu_isa={isa!r}, compiled for")
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, greedy, use_tqdm=False)]

    assert tokens(cpu_isa=isa) == tokens(preset="m3")


@pytest.mark.parametrize(
    ("compiled_for", "native", "expected"),
    [
        ("avx2 fma f16c", False, True),
        ("neon", False, True),
        ("", False, False),
        (None, False, False),  # no compiler
        (None, True, True),
    ],
)
def test_bf16_is_the_default_where_it_is_fast(
    compiled_for: str | None, native: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our kernels need vectors for it, but no bfloat16 instructions; torch needs those."""
    ops = None if compiled_for is None else SimpleNamespace(compiled_for=lambda: compiled_for)
    monkeypatch.setattr(platforms, "load_ops", lambda isa: ops)
    monkeypatch.setattr(platforms, "has_native_bf16", lambda device: native)
    assert platforms.has_fast_bf16("cpu", KernelConfig(linear_backend="auto")) == expected
    assert platforms.has_fast_bf16("cpu", KernelConfig()) == native, "plain torch has to emulate it"
