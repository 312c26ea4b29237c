"""From a name to a folder: every wrong name and every broken folder has its message, and nothing heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from folovllm.hub import (
    HubError,
    ModelFolderError,
    ModelNotFoundError,
    check_model_folder,
    find_model,
    list_aliases,
    repo,
)
from folovllm.hub.aliases import ALIASES, alias_folder, default_download_dir
from folovllm.hub.folder import weight_files

pytestmark = pytest.mark.m0


def safetensors_bytes(payload: bytes = b"\0" * 8) -> bytes:
    """A whole safetensors file with one fp32 tensor, by the format's definition."""
    header = {
        "__metadata__": {},
        "w": {"dtype": "F32", "shape": [len(payload) // 4], "data_offsets": [0, len(payload)]},
    }
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + payload


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors_bytes())
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "model")


def test_a_whole_folder_is_returned_as_it_is(model: Path) -> None:
    assert find_model(model) == find_model(str(model)) == find_model(f" {model} ") == model


def test_the_alias_points_into_the_cache_or_download_dir(tmp_path: Path) -> None:
    assert list_aliases() == ["smollm2-135m"]
    alias = ALIASES["smollm2-135m"]
    assert alias_folder(alias) == default_download_dir() / "smollm2-135m"
    folder = make_folder(tmp_path / "smollm2-135m")
    assert find_model("smollm2-135m", download_dir=tmp_path) == folder


def test_an_alias_wins_over_a_folder_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "smollm2-135m")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="not here yet"):
        find_model("smollm2-135m", download_dir=tmp_path / "elsewhere")
    assert find_model("./smollm2-135m") == Path("smollm2-135m")


WRONG_NAMES = [
    ("", r"expected a model name; found an empty one; to fix it: try 'smollm2-135m'"),
    ("   ", r"found an empty one"),
    ("smollm2-135m", r"not here yet.*run 'folovllm pull smollm2-135m --download-dir .*' once"),
    ("smolm2-135", r"unknown model 'smolm2-135'.*did you mean 'smollm2-135m'\?"),
    ("SmolLM2-135M", r"did you mean 'smollm2-135m'\?"),
    ("gpt-oss", r"unknown model 'gpt-oss'.*known alias \(smollm2-135m\).*write a folder as './gpt-oss'"),
    ("./no/such", r"no model at no/such.*the path exists up to"),
    ("~/no-such-model-folder", r"no model at .*no-such-model-folder"),
    ("a/b/c", r"no model at a/b/c.*correct the path"),
    ("C:\\models\\x", r"no model at"),
    ("org/na--me", r"unknown model 'org/na--me'"),
]


@pytest.mark.parametrize(("name", "message"), WRONG_NAMES)
def test_a_wrong_name_says_what_to_do(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(repo, "_snapshot", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(ModelNotFoundError, match=message):
        find_model(name, download_dir=tmp_path / "cache")


def test_a_wrong_path_shows_the_last_right_part(model: Path) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        find_model(model.parent / "modle")
    assert str(model.parent) in str(error.value)
    assert "which holds model" in str(error.value)


def _without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def _consolidated(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")


def _old_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def _missing_shard(folder: Path) -> None:
    index = {"weight_map": {"w": "model.safetensors", "v": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


WHOLE = safetensors_bytes()
BROKEN_FOLDERS = [
    (_empty, r"expected config.json; found an empty folder"),
    (_without("config.json"), r"expected config.json; found model.safetensors, tokenizer.json; to fix it"),
    (_written("config.json", b"{"), r"config.json: expected valid JSON"),
    (_written("config.json", b"\xff\xfe"), r"config.json: expected valid JSON"),
    (_written("config.json", b"[]"), r"config.json: expected a JSON object; found list"),
    (
        _without("tokenizer.json"),
        r"expected tokenizer.json; found config.json, model.safetensors; .*copy tokenizer.json",
    ),
    (_old_tokenizer, r"expected tokenizer.json; .*AutoTokenizer.from_pretrained"),
    (_without("model.safetensors"), r"at least one .safetensors file; .*download the model's"),
    (_pickled, r"found .*pytorch_model.bin.*pickled weights are never opened.*AutoModelForCausalLM"),
    (_gguf, r"a GGUF is read only by 'folovllm pull'"),
    (_consolidated, r"at least one .safetensors file"),
    (
        _written("model.safetensors", WHOLE[:-1]),
        rf"expected {len(WHOLE)} bytes.*found {len(WHOLE) - 1} bytes.*cut short",
    ),
    (_written("model.safetensors", WHOLE + b"x"), rf"expected {len(WHOLE)} bytes.*found {len(WHOLE) + 1} bytes"),
    (_written("model.safetensors", WHOLE[:20]), r"expected a safetensors header; found 20 bytes"),
    (_written("model.safetensors", b"ab"), r"expected a safetensors header; found 2 bytes"),
    (_written("model.safetensors", (4).to_bytes(8, "little") + b"PK!!"), r"header in JSON; found something else"),
    (_written("model.safetensors", (2).to_bytes(8, "little") + b"[]"), r"header in JSON; found something else"),
    (_written("model.safetensors.index.json", b"{}"), r"expected a 'weight_map'"),
    (_missing_shard, r"2 weight files named in .*found model-00002.safetensors missing"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN_FOLDERS)
def test_a_broken_folder_is_refused(damage: Callable[[Path], None], message: str, model: Path) -> None:
    damage(model)
    with pytest.raises(ModelFolderError, match=message) as error:
        find_model(model)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("name", "message"),
    [("m.gguf", "read only by 'folovllm pull'"), ("m.safetensors", "pass the folder that holds it")],
)
def test_a_file_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelFolderError, match=message):
        find_model(tmp_path / name)


def test_pickles_beside_safetensors_are_ignored(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"would run code")
    (model / "consolidated.safetensors").write_bytes(b"not even whole")
    assert check_model_folder(model) == model
    assert weight_files(model) == ["model.safetensors"]


class FakeHub:
    """Stands for huggingface_hub: a cache that may hold the model, and a network that may answer."""

    def __init__(self, cached: Path | None, online: Path | Exception) -> None:
        self.cached, self.online, self.calls = cached, online, []

    def __call__(self, repo_id: str, download_dir: str | Path | None, offline: bool, weights: bool = True) -> Path:
        self.calls.append((repo_id, download_dir, offline))
        if offline:
            if self.cached is None:
                raise FileNotFoundError("nothing cached")
            return self.cached
        if isinstance(self.online, Exception):
            raise self.online
        return self.online


def test_a_cached_repository_asks_no_network(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(cached=model, online=OSError("no network"))
    monkeypatch.setattr(repo, "_snapshot", hub)
    assert find_model("Qwen/Qwen3-0.6B", download_dir="somewhere") == model
    assert hub.calls == [("Qwen/Qwen3-0.6B", "somewhere", True)]


def test_a_half_cached_repository_is_completed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = make_folder(tmp_path / "half")
    (half / "model.safetensors").unlink()
    monkeypatch.setattr(repo, "_snapshot", FakeHub(cached=half, online=model))
    assert find_model("Qwen/Qwen3-0.6B") == model


def test_an_unreachable_repository_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repo, "_snapshot", FakeHub(cached=None, online=OSError("no route\nmore lines")))
    with pytest.raises(ModelNotFoundError, match=r"cannot get 'Qwen/Qwen3-0.6B'.*OSError: no route; to fix") as error:
        find_model("Qwen/Qwen3-0.6B")
    assert "folovllm pull" not in str(error.value)
    with pytest.raises(ModelNotFoundError, match=r"'folovllm pull smollm2-135m' gets the same model"):
        find_model("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_repository_of_pickles_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model / "model.safetensors").unlink()  # what is left when only *.safetensors and *.json are fetched
    monkeypatch.setattr(repo, "_snapshot", FakeHub(cached=None, online=model))
    with pytest.raises(ModelFolderError, match=r"HuggingFace repository 'org/pickled'.*at least one .safetensors"):
        find_model("org/pickled")


def test_no_pickle_is_ever_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "onnx/config.json",
    ]
    files += ["consolidated.safetensors", "tokenizer.json", "chat_template.jinja", "training_args.pt"]
    files += ["original/tokenizer.model", "onnx/model.safetensors", "additional_chat_templates/tool_use.jinja"]
    asked: dict[str, list[str]] = {}

    def snapshot_download(repo_id: str, **kwargs: object) -> str:
        asked[repo_id] = list(
            filter_repo_objects(files, **{k: kwargs[k] for k in ("allow_patterns", "ignore_patterns")})
        )
        assert kwargs["cache_dir"] == str(tmp_path)
        return str(make_folder(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    find_model("org/name", download_dir=tmp_path)
    wanted = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
    assert asked["org/name"] == [*wanted, "additional_chat_templates/tool_use.jinja"]


def test_resolving_imports_nothing_heavy(model: Path) -> None:
    heavy = ["torch", "transformers", "gguf", "huggingface_hub", "numpy", "safetensors", "rich", "filelock"]
    code = (
        "import sys; from folovllm.hub import find_model;"
        f"find_model({str(model)!r}); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_error_of_the_package_is_a_value_error() -> None:
    assert issubclass(HubError, ValueError)
    assert issubclass(ModelNotFoundError, HubError) and issubclass(ModelFolderError, HubError)
