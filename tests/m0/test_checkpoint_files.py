"""Which files are the checkpoint: nothing is read that HuggingFace would not read, and nothing is left out in silence.

Public reports: vllm issue 40765 and eugr/spark-vllm-docker pull 134 (a backup beside model.safetensors was loaded over
it).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folovllm.checkpoint_files import INDEX, find_checkpoint
from folovllm.hf_config import load_hf_config
from folovllm.hub.errors import ModelFolderError
from folovllm.hub.folder import check_model_folder
from folovllm.model_executor.model_loader import load_model
from folovllm.model_executor.weight_utils import WeightsError, iterate_weights, safetensors_files

pytestmark = pytest.mark.m0


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir(exist_ok=True)
    for name in names:
        save_file({name: torch.zeros(2)}, path / name)
    return path


def write_index(folder: Path, **weight_map: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "present,read,unread",
    [
        (["model.safetensors"], ["model.safetensors"], []),
        (["model.safetensors", "model_old.safetensors"], ["model.safetensors"], ["model_old.safetensors"]),
        (["model.safetensors", "a.safetensors"], ["model.safetensors"], ["a.safetensors"]),
        (["adapter_model.safetensors", "model.safetensors"], ["model.safetensors"], ["adapter_model.safetensors"]),
        (["consolidated.safetensors", "model.safetensors"], ["model.safetensors"], ["consolidated.safetensors"]),
        (
            ["model-00001-of-00002.safetensors", "model.safetensors", "model-00002-of-00002.safetensors"],
            ["model.safetensors"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (["other.safetensors", "optimizer.safetensors"], ["other.safetensors"], ["optimizer.safetensors"]),
        (
            ["m-00002-of-00002.safetensors", "m-00001-of-00002.safetensors", "backup.safetensors"],
            ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"],
            ["backup.safetensors"],
        ),
        (["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"], []),
        ([], [], []),
        (["adapter_model.safetensors"], [], ["adapter_model.safetensors"]),
    ],
)
def test_what_is_read_without_an_index(present: list[str], read: list[str], unread: list[str], tmp_path: Path) -> None:
    found = find_checkpoint(folder_with(tmp_path / "m", *present))
    assert [path.name for path in found.files] == read and found.unread == unread


def test_an_index_names_its_shards(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", "x.safetensors", "y.safetensors", "z.safetensors")
    write_index(folder, a="y.safetensors", b="x.safetensors", c="y.safetensors")
    found = find_checkpoint(folder)
    assert [path.name for path in found.files] == ["x.safetensors", "y.safetensors"]
    assert found.unread == ["z.safetensors"]


@pytest.mark.parametrize(
    "present,index,message",
    [
        # HuggingFace would read the single file, vLLM the shards.
        (
            ["model.safetensors", "x.safetensors"],
            {"a": "x.safetensors"},
            "one checkpoint in .*model.safetensors and an",
        ),
        (["x.safetensors"], {"a": "x.safetensors", "b": "y.safetensors"}, "found y.safetensors missing"),
        (["m-00001-of-00003.safetensors"], None, r"3 shards in .*found 1 of them \(m-00001-of-00003.safetensors\)"),
        (
            ["m-00001-of-00001.safetensors", "old-00001-of-00001.safetensors"],
            None,
            "one checkpoint in .*found m-00001-of-00001.safetensors and old-00001-of-00001.safetensors",
        ),
    ],
)
def test_unclear_checkpoints_are_refused(
    present: list[str], index: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "m", *present)
    if index is not None:
        write_index(folder, **index)
    with pytest.raises(WeightsError, match=message) as caught:
        safetensors_files(folder)
    assert "to fix it:" in str(caught.value)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelFolderError, match=message):
        check_model_folder(folder, tokenizer=False)


@pytest.mark.parametrize(
    "name,message",
    [
        ("adapter_model.safetensors", "a LoRA adapter, which FoloVLLM does not apply"),
        ("consolidated.00.safetensors", "the same weights under Mistral's own names"),
    ],
)
def test_a_file_of_another_kind_alone_is_no_model(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        safetensors_files(folder_with(tmp_path / "m", name))


def test_a_tensor_in_two_files_is_refused_naming_both(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", "a.safetensors")
    save_file({"a.safetensors": torch.ones(2)}, folder / "b.safetensors")
    message = r"tensor 'a.safetensors' in one file .*found it in a.safetensors and in b.safetensors"
    with pytest.raises(WeightsError, match=message):
        next(iterate_weights(safetensors_files(folder)))


def test_a_tensor_that_two_shards_of_an_index_hold_is_refused(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_dir("llama_sharded"), tmp_path / "m")
    shards = sorted(folder.glob("*.safetensors"))
    first, second = load_file(shards[0]), load_file(shards[1])
    name = next(iter(first))
    save_file(second | {name: torch.zeros_like(first[name])}, shards[1])
    with pytest.raises(WeightsError, match=rf"'{name}' .*found it in {shards[0].name} and in {shards[1].name}"):
        load_model(folder, load_hf_config(folder), torch.float32, torch.device("cpu"))


def test_a_tensor_that_the_index_looks_for_elsewhere_is_refused(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model_dir("llama_sharded"), tmp_path / "m")
    index = json.loads((folder / INDEX).read_text())
    name, shard = "model.norm.weight", sorted(folder.glob("*.safetensors"))[0].name
    assert index["weight_map"][name] != shard
    index["weight_map"][name] = shard
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=rf"{shard} without {name}"):
        load_model(folder, load_hf_config(folder), torch.float32, torch.device("cpu"))


def test_a_backup_beside_the_model_changes_nothing_and_is_named(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    for name in ("model_old.safetensors", "adapter_model.safetensors"):
        save_file({key: torch.zeros_like(tensor) for key, tensor in tensors.items()}, folder / name)
    model = load_model(folder, load_hf_config(folder), torch.float32, torch.device("cpu"))
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert "read model.safetensors; not read: adapter_model.safetensors (a LoRA adapter" in caplog.text
    assert "model_old.safetensors" in caplog.text


@pytest.mark.parametrize(
    "dtype,message",
    [
        (torch.float8_e4m3fn, "expected floating-point values; found float8_e4m3fn, which needs scales"),
        (torch.int8, "expected floating-point values; found int8"),
        (torch.bool, "expected floating-point values; found bool"),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(
    dtype: torch.dtype, message: str, tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    """An fp8 weight without its scale converts to bf16 without an error, and is wrong by that scale."""
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"tensor '{name}': {message}"):
        load_model(folder, load_hf_config(folder), torch.float32, torch.device("cpu"))


def test_wider_and_narrower_floats_are_converted(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
        model = load_model(folder, load_hf_config(folder), torch.float32, torch.device("cpu"))
        assert torch.equal(model.model.layers[0].mlp.down_proj.weight, tensors[name].to(dtype).float())


def test_a_zero_bias_needs_a_layer(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.down_proj.bias": torch.zeros(56)}, folder / "model.safetensors")
    load_model(folder, load_hf_config(folder), torch.float32, torch.device("cpu"))
    save_file(tensors | {"model.layers.9.mlp.down_proj.bias": torch.zeros(56)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"1 unexpected \(model.layers.9.mlp.down_proj.bias\)"):
        load_model(folder, load_hf_config(folder), torch.float32, torch.device("cpu"))
