"""The loader: every tensor finds its place, and whatever is wrong with a checkpoint is said (milestone M0)."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from folovllm.distributed.communicator import Communicator
from folovllm.distributed.thread_communicator import ThreadGroup
from folovllm.hf_config import SUPPORTED_ARCHITECTURES, load_hf_config
from folovllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from folovllm.model_executor.layers.vocab_embedding import ParallelLMHead, VocabParallelEmbedding
from folovllm.model_executor.model_loader import load_model, random_model
from folovllm.model_executor.models import registry
from folovllm.model_executor.models.llama import LlamaForCausalLM
from folovllm.model_executor.parameter import ShapeMismatchError
from folovllm.model_executor.weight_utils import WeightsError

pytestmark = pytest.mark.m0

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> LlamaForCausalLM:
    return load_model(folder, load_hf_config(folder), dtype, CPU, **kwargs)


@pytest.fixture
def copy_of(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny model that the test may damage."""
    return lambda name: shutil.copytree(tiny_model_dir(name), tmp_path / name)


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(WeightsError, match=message) as caught:
        load(folder)
    text = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "expected" in text and "found" in text and "to fix it:" in text and folder.name in text


# --- What loads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied_bias", "qwen3", "llama_sharded"])
def test_every_value_arrives(name: str, tiny_model_dir: Callable[[str], Path]) -> None:
    folder = tiny_model_dir(name)
    checkpoint: Tensors = {}
    files = list(folder.glob("*.safetensors"))
    for path in files:
        checkpoint |= load_file(path)
    assert (len(files) > 5) == (name == "llama_sharded")
    model = load(folder)
    split = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    for ours, param in model.named_parameters():
        fused = next((key for key in split if key in ours), None)
        names = [ours.replace(fused, part) for part in split[fused]] if fused else [ours]
        torch.testing.assert_close(param.data, torch.cat([checkpoint.pop(n) for n in names]), atol=0, rtol=0)
    assert not checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_one_asked_for(dtype: torch.dtype, tiny_model_dir: Callable[[str], Path]) -> None:
    model = load(tiny_model_dir("qwen2"), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32


def test_tied_model_may_carry_its_head_twice(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("qwen3")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.arch.tie_word_embeddings


def test_a_tied_config_with_a_head_of_its_own(copy_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    """huggingface/transformers pull 42612, vllm pull 51665: the head was trained; the config is wrong about it."""
    folder = copy_of("llama")
    edit_config(folder, tie_word_embeddings=True)
    model, trained = load(folder), load_file(folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, trained["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, trained["model.embed_tokens.weight"])
    assert "the lm_head.weight in the checkpoint is not model.embed_tokens.weight" in caplog.text


def test_a_tied_checkpoint_may_name_its_embedding_after_the_head(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("qwen3")
    reference = load(folder).lm_head.weight.clone()
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    model = load(folder)
    assert torch.equal(model.model.embed_tokens.weight, reference)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_of_another_shape_is_refused(copy_of: Callable[[str], Path]) -> None:
    folder = rewrite(copy_of("qwen3"), lambda t: t.update({"lm_head.weight": torch.zeros(3, 3)}))
    refused(folder, r"tensor 'lm_head.weight': expected shape \[264, 56\]; found \[3, 3\]")


def test_an_untied_config_without_a_head_is_refused(copy_of: Callable[[str], Path]) -> None:
    """HuggingFace would draw a random head."""
    refused(rewrite(copy_of("llama"), lambda t: t.pop("lm_head.weight")), r"1 missing \(lm_head.weight\)")


def test_old_rotary_tables_are_ignored(copy_of: Callable[[str], Path]) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(rewrite(copy_of("llama"), lambda t: t.update({name: torch.ones(12)})))


def test_consolidated_duplicates_are_ignored(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("mistral")
    (folder / "consolidated.safetensors").write_bytes(b"other names")
    load(folder)


# --- What is refused --------------------------------------------------------------------------------------------------


def test_missing_tensors_are_listed(copy_of: Callable[[str], Path]) -> None:
    folder = rewrite(copy_of("llama"), lambda t: [t.pop(n) for n in list(t) if "layers.1." in n])
    refused(folder, r"9 missing \(model\.layers\.1\.self_attn\.q_proj\.weight, .* and 5 more\)")


@pytest.mark.parametrize("name", ["self_attn.k_proj.weight", "self_attn.v_proj.bias", "mlp.up_proj.weight"])
def test_a_missing_part_of_a_fused_layer_is_noticed(name: str, copy_of: Callable[[str], Path]) -> None:
    full = f"model.layers.0.{name}"
    refused(rewrite(copy_of("qwen2"), lambda t: t.pop(full)), rf"1 missing \({full}\)")


def test_missing_head_hints_at_tying(copy_of: Callable[[str], Path]) -> None:
    refused(rewrite(copy_of("llama"), lambda t: t.pop("lm_head.weight")), "config.json needs tie_word_embeddings")


def test_unexpected_tensors_are_listed(copy_of: Callable[[str], Path]) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    refused(
        rewrite(copy_of("llama"), lambda t: t.update({name: torch.ones(168)})),
        rf"1 unexpected \({name}\).*'attention_bias'",
    )


def test_fewer_layers_in_config_than_in_the_weights(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    edit_config(folder, num_hidden_layers=1)
    refused(folder, r"9 unexpected \(model\.layers\.1\.")


@pytest.mark.parametrize(
    "name,shape,expected",
    [
        ("model.layers.1.self_attn.k_proj.weight", (48, 56), r"expected shape \[24, 56\]; found \[48, 56\]"),
        ("model.layers.0.mlp.up_proj.weight", (72, 55), r"expected shape \[72, 56\]; found \[72, 55\]"),
        ("model.layers.0.mlp.down_proj.weight", (72, 56), r"expected shape \[56, 72\]; found \[72, 56\]"),
        ("model.norm.weight", (1, 56), r"expected shape \[56\]; found \[1, 56\]"),
        ("model.embed_tokens.weight", (265, 56), r"expected shape \[264, 56\]; found \[265, 56\]"),
    ],
)
def test_wrong_shapes_name_the_tensor(
    name: str, shape: tuple[int, ...], expected: str, copy_of: Callable[[str], Path]
) -> None:
    refused(rewrite(copy_of("llama"), lambda t: t.update({name: torch.ones(shape)})), f"'{name}': {expected}")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(keep: int, copy_of: Callable[[str], Path]) -> None:
    path = (folder := copy_of("llama")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, rf"model\.safetensors of {path.stat().st_size:,} bytes .*fetch it again")


def test_corrupt_header(copy_of: Callable[[str], Path]) -> None:
    path = (folder := copy_of("llama")) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:40] = b"\xff" * 20
    path.write_bytes(data)
    refused(folder, r"model\.safetensors of .* bytes .*fetch it again")


def test_absent_shard_is_named(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama_sharded")
    victim = sorted(folder.glob("model-*.safetensors"))[2]
    victim.unlink()
    refused(folder, rf"files named in model\.safetensors\.index\.json; found {victim.name} missing")


def test_index_promising_a_tensor_its_shard_lacks(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama_sharded")
    name = "model.norm.weight"
    shard = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    refused(folder, rf"found .*{shard.name} without {name};")


BROKEN_INDEXES = [
    ("{", r"valid JSON in model\.safetensors\.index\.json"),
    ("[]", "a JSON object in model"),
    ('{"metadata": {}}', r"a 'weight_map' in .*model\.safetensors\.index\.json"),
    ('{"weight_map": 3}', "a 'weight_map' in"),
    ('{"weight_map": {"a": "../other/model.safetensors"}}', "names of .*safetensors files in .*found '../other"),
    ('{"weight_map": {"a": 3}}', "names of .*safetensors files in .*found 3"),
]


@pytest.mark.parametrize("text,message", BROKEN_INDEXES)
def test_broken_index(text: str, message: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama_sharded")
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, message)


def test_pickles_are_never_opened(copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "exploded",))

    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    refused(folder, r"pickled weights only \(pytorch_model\.bin\).*never opened.*save_pretrained")
    assert not (folder / "exploded").exists()


def test_folder_without_weights(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()
    refused(folder, r"found none; .*download the model's weights")


# --- Random models, registry, quant methods ---------------------------------------------------------------------------


def test_random_model_repeats_with_its_seed(tiny_model_dir: Callable[[str], Path]) -> None:
    arch = load_hf_config(tiny_model_dir("llama_tied_bias"))
    first, second, other = (random_model(arch, torch.bfloat16, CPU, seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
        assert name.endswith("norm.weight") or not torch.equal(a, c)


def test_random_model_runs_the_embedding_to_logits(tiny_model_dir: Callable[[str], Path]) -> None:
    model = random_model(load_hf_config(tiny_model_dir("llama")), torch.float32, CPU)
    logits = model.compute_logits(model.model.norm(model.model.embed_tokens(torch.tensor([3, 4]))))
    assert logits.shape == (2, 264) and 0.5 < logits.std() < 2.0


def test_registry_and_config_know_the_same_architectures() -> None:
    assert set(registry._MODELS) == set(SUPPORTED_ARCHITECTURES)
    assert [registry.get_model_class(name).__name__ for name in SUPPORTED_ARCHITECTURES] == [*SUPPORTED_ARCHITECTURES]
    with pytest.raises(ValueError, match=r"expected one of .*Qwen3ForCausalLM.*; found 'GPT2LMHeadModel'"):
        registry.get_model_class("GPT2LMHeadModel")


def test_a_registered_model_is_built(tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(LlamaForCausalLM):
        pass

    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    registry.register_model("MineForCausalLM", Mine)
    arch = replace(load_hf_config(tiny_model_dir("llama")), architecture="MineForCausalLM")
    assert type(load_model(tiny_model_dir("llama"), arch, torch.float32, CPU)) is Mine


class Doubling(UnquantizedLinearMethod):
    """A quant method that can be told from the plain one."""

    processed: list[LinearBase]

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        self.processed.append(layer)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().apply(layer, x)


def test_quant_config_decides_layer_by_layer(tiny_model_dir: Callable[[str], Path]) -> None:
    method, seen = Doubling(), []
    method.processed = []

    class Config:
        def get_quant_method(self, layer: nn.Module, prefix: str) -> Doubling | None:
            seen.append(prefix)
            return method if prefix.endswith("mlp.down_proj") else None

    model = load(tiny_model_dir("llama"), quant_config=Config())
    parts = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    assert seen == [f"model.layers.{i}.{part}" for i in range(2) for part in parts] + ["lm_head"]
    down = model.model.layers[1].mlp.down_proj
    assert method.processed == [layer.mlp.down_proj for layer in model.model.layers]
    x = torch.randn(3, 72)
    torch.testing.assert_close(down(x), 2 * x @ down.weight.T)


# --- Tensor-parallel shards -------------------------------------------------------------------------------------------


def rank_of(rank: int, size: int) -> Communicator:
    """One end of a group whose other ranks are not there: enough to load a shard."""
    return ThreadGroup(size).communicator(rank)


def rows(n: int, columns: int = 2, start: int = 0) -> torch.Tensor:
    """Row r holds r + start, so a misplaced row shows."""
    return (torch.arange(n, dtype=torch.float32) + start).unsqueeze(1).repeat(1, columns)


def held(layer: nn.Module) -> list[float]:
    return layer.weight[:, 0].tolist()


@pytest.mark.parametrize(
    "world,rank,expected",
    [
        (1, 0, [0, 1, 2, 3, 4, 5, 6, 7, 100, 101, 102, 103, 200, 201, 202, 203]),
        (2, 0, [0, 1, 2, 3, 100, 101, 200, 201]),
        (2, 1, [4, 5, 6, 7, 102, 103, 202, 203]),
        (4, 1, [2, 3, 100, 101, 200, 201]),  # 2 KV heads on 4 ranks: ranks 0 and 1 share head 0
        (4, 2, [4, 5, 102, 103, 202, 203]),
    ],
)
def test_qkv_shards(world: int, rank: int, expected: list[float]) -> None:
    layer = QKVParallelLinear(2, head_size=2, num_heads=4, num_kv_heads=2, bias=True, tp=rank_of(rank, world))
    for shard_id, tensor in (("q", rows(8)), ("k", rows(4, start=100)), ("v", rows(4, start=200))):
        layer.weight_loader(layer.weight, tensor, shard_id)
        layer.weight_loader(layer.bias, tensor[:, 0], shard_id)
    assert held(layer) == expected == layer.bias.tolist()


def test_merged_shards() -> None:
    layers = [MergedColumnParallelLinear(2, [4, 6], tp=rank_of(rank, 2)) for rank in (0, 1)]
    for layer in layers:
        layer.weight_loader(layer.weight, rows(4), 0)
        layer.weight_loader(layer.weight, rows(6, start=100), 1)
    assert [held(layer) for layer in layers] == [[0, 1, 100, 101, 102], [2, 3, 103, 104, 105]]


def test_row_shards_cut_the_input_and_the_bias_is_rank_0s() -> None:
    first, second = (RowParallelLinear(4, 3, bias=True, tp=rank_of(rank, 2)) for rank in (0, 1))
    for layer in (first, second):
        layer.weight_loader(layer.weight, torch.arange(12.0).view(3, 4))
        layer.weight_loader(layer.bias, torch.tensor([7.0, 8.0, 9.0]))
    assert second.weight.tolist() == [[2, 3], [6, 7], [10, 11]]
    assert first.bias.tolist() == [7, 8, 9] and second.bias.tolist() == [0, 0, 0]
    with pytest.raises(ShapeMismatchError, match=r"expected shape \[3\]; found \[2\]"):
        second.weight_loader(second.bias, torch.ones(2))


@pytest.mark.parametrize("make", [VocabParallelEmbedding, lambda n, h, **kw: ParallelLMHead(h, n, **kw)])
def test_vocabulary_shards(make: Callable[..., nn.Module]) -> None:
    layer = make(6, 2, tp=rank_of(1, 3))
    layer.weight_loader(layer.weight, rows(6))
    assert held(layer) == [2, 3]


@pytest.mark.parametrize("make", [VocabParallelEmbedding, lambda n, h, **kw: ParallelLMHead(h, n, **kw)])
def test_a_vocabulary_that_does_not_divide_ends_in_zeros(make: Callable[..., nn.Module]) -> None:
    """7 tokens on 4 ranks, and 5 on 4: the last rank has no token at all."""
    for vocab_size, last, expected in ((7, 3, [7, 0]), (5, 2, [5, 0]), (5, 3, [0, 0])):
        layer = make(vocab_size, 2, tp=rank_of(last, 4))
        layer.weight_loader(layer.weight, rows(vocab_size, start=1))
        assert held(layer) == expected
    with pytest.raises(ShapeMismatchError, match=r"expected shape \[5, 2\]; found \[8, 2\]"):
        layer.weight_loader(layer.weight, rows(8))


def test_partial_sums_of_all_ranks_are_the_whole_layer() -> None:
    """Column then row: what ranks compute apart adds up to the unsharded product."""
    up, down, x = torch.randn(8, 6), torch.randn(5, 8), torch.randn(3, 6)
    total = torch.zeros(3, 5)
    for rank in range(4):
        column, row = (
            ColumnParallelLinear(6, 8, tp=rank_of(rank, 4)),
            RowParallelLinear(8, 5, tp=rank_of(rank, 4)),
        )
        column.weight_loader(column.weight, up)
        row.weight_loader(row.weight, down)
        total += row.quant_method.apply(row, column(x))
    torch.testing.assert_close(total, x @ up.T @ down.T)


def test_a_shard_of_the_wrong_whole_is_refused() -> None:
    layer = QKVParallelLinear(2, head_size=2, num_heads=4, num_kv_heads=2, tp=rank_of(0, 2))
    with pytest.raises(ShapeMismatchError, match=r"expected shape \[4, 2\]; found \[2, 2\]"):
        layer.weight_loader(layer.weight, rows(2), "k")
    with pytest.raises(AssertionError, match="9 does not divide into 2"):
        ColumnParallelLinear(3, 9, tp=rank_of(0, 2))
