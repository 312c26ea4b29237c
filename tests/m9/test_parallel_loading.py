"""What each rank loads: its stage's tensors under their own names, its part of them, and nothing silently."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from folovllm.distributed.thread_communicator import thread_groups
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.model_executor import weight_utils
from folovllm.model_executor.layers.linear import LinearBase
from folovllm.model_executor.model_loader import load_model, of_another_stage, random_model
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.model_executor.weight_utils import WeightsError, checkpoint_targets
from folovllm.parallel import ModelShard, ParallelConfig
from tests.m9.parallel_models import PARALLEL_MODELS, make_parallel

pytestmark = pytest.mark.m9

CPU = torch.device("cpu")
LAYOUTS = [(2, 1), (4, 1), (1, 2), (1, 3), (2, 2)]  # parts, stages


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_parallel(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def all_ranks(folder: Path, tp: int, pp: int, **args: Any) -> list[LlamaForCausalLM]:
    config = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    arch = load_hf_config(folder)
    return [load_model(folder, arch, torch.float32, CPU, groups=groups, **args) for groups in thread_groups(config)]


def names(model: LlamaForCausalLM) -> set[str]:
    """Of the checkpoint's tensors that the model has a place for."""
    return set(checkpoint_targets(model, model.packed_modules_mapping))


def joined(parts: list[LlamaForCausalLM], name: str) -> torch.Tensor:
    """The parameter `name` of one stage, put together from the parts; fused ones part by part, as one rank has them."""
    modules = [part.get_submodule(name.rpartition(".")[0]) for part in parts]
    tensors = [part.get_parameter(name) for part in parts]
    if all(torch.equal(tensor, tensors[0]) for tensor in tensors):
        return tensors[0]  # norms
    if isinstance(modules[0], LinearBase) and type(modules[0]).__name__ == "RowParallelLinear":
        return sum(tensors) if tensors[0].dim() == 1 else torch.cat(tensors, dim=1)  # type: ignore[return-value]
    sizes = list(modules[0].output_parts().values()) if isinstance(modules[0], LinearBase) else [len(tensors[0])]
    pieces = []
    for number, split in enumerate(zip(*(tensor.split(sizes) for tensor in tensors), strict=True)):
        copies = getattr(modules[0], "kv_copies", 1) if number > 0 else 1
        pieces.append(torch.cat(split[::copies]))
    return torch.cat(pieces)


@pytest.mark.parametrize("tp,pp", LAYOUTS)
@pytest.mark.parametrize("name", PARALLEL_MODELS)
def test_the_ranks_together_hold_the_checkpoint(name: str, tp: int, pp: int, folder_of: Callable[[str], Path]) -> None:
    """No parameter is missing, none differs, and none is on two stages but the table that is embedding and head."""
    folder = folder_of(name)
    (whole,), ranks = all_ranks(folder, 1, 1), all_ranks(folder, tp, pp)
    stages = [ranks[stage * tp : (stage + 1) * tp] for stage in range(pp)]
    found: list[str] = []
    for parts in stages:
        for param_name, _ in parts[0].named_parameters():
            vocab = len(whole.get_parameter(param_name))
            assert torch.equal(joined(parts, param_name)[:vocab], whole.get_parameter(param_name)), param_name
            found.append(param_name)
    assert set(found) == {param_name for param_name, _ in whole.named_parameters()}
    twice = {param_name for param_name in found if found.count(param_name) > 1}
    assert twice == ({"model.embed_tokens.weight"} if pp > 1 and whole.arch.tie_word_embeddings else set())


def test_a_stage_has_its_own_layers_under_their_numbers(folder_of: Callable[[str], Path]) -> None:
    first, last = all_ranks(folder_of("biases"), 1, 2)
    assert [name for name, _ in first.model.layers.named_children()] == ["0", "1"]
    assert [name for name, _ in last.model.layers.named_children()] == ["2"] and len(last.model.layers) == 1
    assert len(last.attention_layers()) == 1
    assert "model.embed_tokens.weight" in names(first) and "model.norm.weight" not in names(first)
    assert {"model.norm.weight", "lm_head.weight"} < names(last) and "model.embed_tokens.weight" not in names(last)


def test_a_rank_reads_no_tensor_of_another_stage(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the files they are only mapped; what is copied is the rank's own."""
    copied: list[str] = []
    load_one, arch = weight_utils._load_one, load_hf_config(folder_of("qwen2"))
    monkeypatch.setattr(weight_utils, "_load_one", lambda name, *args: (copied.append(name), load_one(name, *args)))
    for groups in thread_groups(ParallelConfig(pipeline_parallel_size=3)):
        model = load_model(folder_of("qwen2"), arch, torch.float32, CPU, groups=groups)
        assert set(copied) == names(model) and len(copied) == len(names(model))
        copied.clear()


def test_a_tied_head_is_on_both_ends(folder_of: Callable[[str], Path]) -> None:
    first, middle, last = all_ranks(folder_of("qwen3"), 1, 3)
    assert torch.equal(first.model.embed_tokens.weight, last.model.embed_tokens.weight)
    assert last.lm_head.weight is last.model.embed_tokens.weight
    assert not hasattr(middle.model, "embed_tokens") and not hasattr(middle, "lm_head")


def test_a_head_without_an_embedding_and_a_trained_head_of_a_tied_model(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """settle_head decides for the whole checkpoint, before a stage passes over anything."""
    source = folder_of("qwen3")
    tensors = load_file(source / "model.safetensors")
    for path in source.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {"lm_head.weight": table}, tmp_path / "model.safetensors", {"format": "pt"})
    first, last = all_ranks(tmp_path, 1, 2)
    assert torch.equal(first.model.embed_tokens.weight, table) and torch.equal(last.lm_head.weight, table)
    both = tensors | {"model.embed_tokens.weight": table, "lm_head.weight": table + 1}
    save_file(both, tmp_path / "model.safetensors", {"format": "pt"})
    first, last = all_ranks(tmp_path, 1, 2)
    assert torch.equal(first.model.embed_tokens.weight, table) and torch.equal(last.lm_head.weight, table + 1)
    assert not hasattr(last.model, "embed_tokens")


@pytest.mark.parametrize(
    "name,stage",
    [
        ("model.layers.2.mlp.extra.weight", 1),  # of a layer that stage 1 has: stage 1 refuses it
        ("model.layers.0.mlp.extra.weight", 0),
        ("model.layers.3.mlp.up_proj.weight", None),  # no stage has such a layer: all refuse it
        ("model.layers.x.mlp.up_proj.weight", None),
        ("model.more.weight", None),
        ("lm_head.extra", 1),
    ],
)
def test_an_unknown_tensor_is_refused_by_name(
    name: str, stage: int | None, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source, config = folder_of("qwen2"), ParallelConfig(pipeline_parallel_size=2)
    for path in source.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors") | {name: torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    for groups in thread_groups(config):
        if stage in (None, groups.shard.pp_rank):
            with pytest.raises(WeightsError, match=f"1 unexpected .{name}"):
                load_model(tmp_path, load_hf_config(tmp_path), torch.float32, CPU, groups=groups)
        else:
            load_model(tmp_path, load_hf_config(tmp_path), torch.float32, CPU, groups=groups)


def test_a_missing_tensor_is_missed_by_the_stage_that_needs_it(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = folder_of("qwen2")
    for path in source.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    arch = load_hf_config(tmp_path)
    first, last = thread_groups(ParallelConfig(pipeline_parallel_size=2))
    load_model(tmp_path, arch, torch.float32, CPU, groups=first)
    with pytest.raises(WeightsError, match=r"1 missing \(model.layers.2.mlp.up_proj.weight\)"):
        load_model(tmp_path, arch, torch.float32, CPU, groups=last)


@pytest.mark.parametrize("tp,pp", LAYOUTS)
@pytest.mark.parametrize("name", PARALLEL_MODELS)
def test_random_ranks_are_shards_of_the_random_model(
    name: str, tp: int, pp: int, folder_of: Callable[[str], Path]
) -> None:
    arch = load_hf_config(folder_of(name))
    whole = random_model(arch, torch.bfloat16, CPU, seed=3)
    config = ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp)
    ranks = [random_model(arch, torch.bfloat16, CPU, seed=3, groups=groups) for groups in thread_groups(config)]
    for stage in range(pp):
        parts = ranks[stage * tp : (stage + 1) * tp]
        for param_name, _ in parts[0].named_parameters():
            expected = whole.get_parameter(param_name)
            assert torch.equal(joined(parts, param_name)[: len(expected)], expected), param_name


def test_every_name_of_a_model_is_on_some_stage(folder_of: Callable[[str], Path]) -> None:
    """`of_another_stage` passes over a name exactly where the stage has no place for it."""
    for name in ("qwen2", "qwen3"):
        arch: ModelArchitecture = load_hf_config(folder_of(name))
        (whole,) = all_ranks(folder_of(name), 1, 1)
        for pp in (2, 3):
            for rank, model in enumerate(all_ranks(folder_of(name), 1, pp)):
                shard = ModelShard(pp_rank=rank, pp_size=pp)
                assert {n for n in names(whole) if not of_another_stage(n, arch, shard)} == names(model)


def test_stages_of_many_layers(folder_of: Callable[[str], Path]) -> None:
    """As vLLM divides them: the stages before the last get what does not divide."""
    arch = dataclasses.replace(load_hf_config(folder_of("qwen2")), num_hidden_layers=30)
    sizes = {pp: [len(ModelShard(pp_rank=i, pp_size=pp).layers(30)) for i in range(pp)] for pp in (1, 2, 4, 7)}
    assert sizes == {1: [30], 2: [15, 15], 4: [7, 8, 8, 7], 7: [4, 4, 4, 4, 5, 5, 4]}
    for pp in sizes:
        assert [i for r in range(pp) for i in ModelShard(pp_rank=r, pp_size=pp).layers(30)] == list(range(30))
    config = ParallelConfig(pipeline_parallel_size=7, tensor_parallel_size=2)
    largest = config.largest_attention_arch(arch)
    assert (largest.num_hidden_layers, largest.num_attention_heads, largest.num_key_value_heads) == (5, 2, 2)
