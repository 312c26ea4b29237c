"""accelerate: what it replaces, that every item has a switch, that all off is the textbook, and that tokens stay.

Milestone: M4. m1 to m3 must run the code that a reader reads, so for them the list of replacements is empty.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from folovllm import LLM, milestones
from folovllm.attention.backend import AttentionSpec
from folovllm.attention.backends.cpu_paged import CpuPagedBackend
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.config import EngineConfig, KernelConfig
from folovllm.csrc.build import load_ops
from folovllm.engine.llm_engine import LLMEngine
from folovllm.executor.uniproc import UniProcExecutor
from folovllm.hf_config import ModelArchitecture, load_hf_config
from folovllm.model_executor.cpu import accelerate as accelerate_module
from folovllm.model_executor.cpu import packed_linear
from folovllm.model_executor.cpu.accelerate import accelerate
from folovllm.model_executor.cpu.fused_ops import FUSED
from folovllm.model_executor.cpu.huge_pages import HugeArena
from folovllm.model_executor.cpu.packed_linear import CppGatedLinearMethod, CppLinearMethod, OneDnnLinearMethod
from folovllm.model_executor.cpu.replacement import Replacement, grouped
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from folovllm.model_executor.model_loader import load_model, random_model
from folovllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from folovllm.model_executor.models.registry import _MODELS, register_model
from folovllm.sample.sampler import Sampler
from folovllm.worker.worker import Worker
from tests.m1.test_models import Bench, prompt
from tests.parity_helpers import GapNaiveModel, Job, add_job, make_job, run_jobs
from tests.tiny_models import TINY_MODELS

pytestmark = pytest.mark.m4

CPU, BF16 = torch.device("cpu"), torch.bfloat16
DTYPES = (torch.float32, BF16)
UNIT = {torch.float32: 2.0**-24, BF16: 2.0**-8}
M4 = milestones.get_rung("m4")
ON = KernelConfig(**{name: value for name, value in M4.on.items() if name != "attention_backend"})
MODEL_SWITCHES = ("linear_backend", "fused_ops", "fused_mlp", "decoder_stack", "sampler_backend")
OFF_VALUES = {name: M4.off[name] for name in MODEL_SWITCHES}

MakeTiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def ops() -> Any:
    loaded = load_ops()
    if loaded is None:
        pytest.skip("no C++ compiler here")
    return loaded


def without(*names: str) -> KernelConfig:
    return dataclasses.replace(ON, **{name: OFF_VALUES[name] for name in names})


def arch_of(folder: Path) -> ModelArchitecture:
    """Sizes that the decoder stack takes: whole blocks of gate and up, heads without padding."""
    return dataclasses.replace(load_hf_config(folder), intermediate_size=96, head_dim=32)


def paged(arch: ModelArchitecture, dtype: torch.dtype = BF16, backend_class: Any = CpuPagedBackend) -> Any:
    heads = (arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim)
    return backend_class(AttentionSpec(*heads, dtype, CPU, 16))


def accelerated(
    folder: Path, kernels: KernelConfig, dtype: torch.dtype = BF16, backend_class: Any = CpuPagedBackend
) -> tuple[LlamaForCausalLM, Sampler, list[Replacement]]:
    arch, sampler = arch_of(folder), Sampler()
    model = random_model(arch, dtype, CPU)
    return model, sampler, accelerate(model, paged(arch, dtype, backend_class), kernels, sampler)


def linears(model: nn.Module) -> list[LinearBase]:
    return [module for module in model.modules() if isinstance(module, LinearBase)]


def methods(model: nn.Module) -> set[type]:
    return {type(layer.quant_method) for layer in linears(model)}


def impls(model: nn.Module) -> set[str]:
    """What norms, activations and rotations compute with: names of operators, or "torch"."""
    fusable = [module for module in model.modules() if type(module) in FUSED]
    return {str(vars(module).get("impl", "torch")) for module in fusable}


def is_textbook(model: Any, sampler: Sampler) -> bool:
    activations = {type(layer.mlp.act_fn) is not nn.Identity for layer in model.model.layers}
    plain = methods(model) == {UnquantizedLinearMethod} and impls(model) == {"torch"} and activations == {True}
    return plain and model.model.decoder_stack is None and sampler.backend == "torch"


# ---- the list


def test_with_all_on_every_part_is_replaced(ops: Any, tiny_model_dir: MakeTiny) -> None:
    model, sampler, replaced = accelerated(tiny_model_dir("llama"), ON)
    assert {item.switch for item in replaced if item.after is not None} == set(MODEL_SWITCHES)
    assert all(item.after is not None for item in replaced)
    assert methods(model) == {CppLinearMethod, CppGatedLinearMethod} and sampler.backend == "cpp"
    assert model.model.decoder_stack is not None
    assert sum(item.count for item in replaced if item.switch == "linear_backend") == len(linears(model))


@pytest.mark.parametrize("switch", MODEL_SWITCHES)
def test_every_item_of_the_list_has_a_switch_that_removes_it(ops: Any, switch: str, tiny_model_dir: MakeTiny) -> None:
    """With it off nothing is replaced in its name, and no other switch does it in its place."""
    _, _, everything = accelerated(tiny_model_dir("llama"), ON)
    model, sampler, rest = accelerated(tiny_model_dir("llama"), without(switch))
    assert any(item.switch == switch for item in everything)
    assert not any(item.switch == switch for item in rest)
    still = {
        "linear_backend": methods(model) != {UnquantizedLinearMethod},
        "fused_ops": impls(model) != {"torch"},
        "fused_mlp": CppGatedLinearMethod in methods(model),
        "decoder_stack": model.model.decoder_stack is not None,
        "sampler_backend": sampler.backend != "torch",
    }
    assert not still[switch]


def test_with_all_off_nothing_is_replaced(tiny_model_dir: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate_module, "load_ops", lambda isa: pytest.fail("plain torch needs no compiler"))
    model, sampler, replaced = accelerated(tiny_model_dir("qwen3"), KernelConfig(), backend_class=TorchNaiveBackend)
    assert replaced == [] and is_textbook(model, sampler)
    assert KernelConfig() == KernelConfig(**{k: v for k, v in M4.off.items() if k != "attention_backend"})


@pytest.mark.parametrize("preset", ["m1", "m2", "m3"])
def test_the_rungs_below_m4_run_the_textbook(preset: str, tiny_model_dir: MakeTiny) -> None:
    worker = worker_of(engine_of(tiny_model_dir("llama"), preset, dtype="bfloat16"))
    runner = worker.model_runner
    assert worker.replacements == [] and runner.backend.name == "torch_naive" and not worker.keeps_freed_memory
    assert is_textbook(runner.model, runner.sampler)


def test_m4_replaces_what_it_can(ops: Any, tiny_model_dir: MakeTiny) -> None:
    worker = worker_of(engine_of(tiny_model_dir("llama"), "m4", dtype="bfloat16"))
    assert {item.switch for item in worker.replacements} == set(MODEL_SWITCHES)
    assert worker.model_runner.backend.name == "cpu_paged"


def test_a_line_says_what_and_why() -> None:
    one = Replacement("fused_ops", "RMSNorm in torch", "csrc rms_norm", "one pass")
    (both,) = grouped([one, one])
    assert str(both) == "fused_ops: 2 x RMSNorm in torch -> csrc rms_norm (one pass)"
    plain = Replacement("decoder_stack", "2 layers", None, "fused_mlp off")
    assert str(plain) == "decoder_stack: 2 layers: stays as it is (fused_mlp off)"


# ---- what cannot be replaced stays plain, and the list says so


def reasons(replaced: list[Replacement], switch: str) -> str:
    return "; ".join(item.why for item in replaced if item.switch == switch and item.after is None)


def test_other_backends_run_module_by_module(ops: Any, tiny_model_dir: MakeTiny) -> None:
    model, _, replaced = accelerated(tiny_model_dir("llama"), ON, backend_class=TorchNaiveBackend)
    assert model.model.decoder_stack is None
    assert "the model runs on torch_naive" in reasons(replaced, "decoder_stack")


def test_heads_that_are_padded_run_module_by_module(ops: Any, tiny_model_dir: MakeTiny) -> None:
    """A head of 24 is padded to 32 by the backend, in Python."""
    arch = dataclasses.replace(load_hf_config(tiny_model_dir("llama")), intermediate_size=96)
    model = random_model(arch, BF16, CPU)
    replaced = accelerate(model, paged(arch), ON)
    assert model.model.decoder_stack is None and "is padded in Python" in reasons(replaced, "decoder_stack")


@pytest.mark.parametrize("off", ["fused_ops", "fused_mlp"])
def test_the_stack_does_not_undo_another_switch(off: str, ops: Any, tiny_model_dir: MakeTiny) -> None:
    model, _, replaced = accelerated(tiny_model_dir("llama"), without(off))
    assert model.model.decoder_stack is None and reasons(replaced, "decoder_stack") == f"{off} off"


class OwnLayer(LlamaDecoderLayer):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor, cos_sin: Any) -> Any:
        hidden, residual = super().forward(hidden, residual, cos_sin)
        return hidden * 0.5, residual


class OwnMLP(LlamaMLP):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.act_fn(self.gate_up_proj(hidden))))


class LayerWithOwnMLP(LlamaDecoderLayer):
    def __init__(self, arch: ModelArchitecture, quant_config: Any, prefix: str, tp: Any) -> None:
        super().__init__(arch, quant_config, prefix, tp)
        self.mlp = OwnMLP(arch, quant_config, f"{prefix}.mlp", tp)


class OwnNorm(RMSNorm):
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        result = super().forward(x) if residual is None else super().forward(x, residual)
        return result * 2 if residual is None else (result[0] * 2, result[1])


class LayerWithOwnNorm(LlamaDecoderLayer):
    def __init__(self, arch: ModelArchitecture, quant_config: Any, prefix: str, tp: Any) -> None:
        super().__init__(arch, quant_config, prefix, tp)
        self.post_attention_layernorm = OwnNorm(arch.hidden_size, arch.rms_norm_eps)


OWN = {
    "layer": (OwnLayer, "decoder_stack", "OwnLayer computes something else than LlamaDecoderLayer"),
    "mlp": (LayerWithOwnMLP, "fused_mlp", "computes something else than LlamaMLP"),
    "norm": (LayerWithOwnNorm, "fused_ops", "it is a class of its own"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OWN)
def test_a_class_of_ones_own_keeps_running_as_it_is(
    kind: str, dtype: torch.dtype, ops: Any, tiny_model_dir: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner's model that inherits from ours: its own forward runs, and the engine gives the textbook's tokens."""
    layer_class, switch, reason = OWN[kind]
    own = type("OwnForCausalLM", (LlamaForCausalLM,), {"decoder_layer_class": layer_class})
    monkeypatch.setitem(_MODELS, "LlamaForCausalLM", _MODELS["LlamaForCausalLM"])
    register_model("LlamaForCausalLM", own)
    folder = tiny_model_dir("llama_rope")
    fast, textbook = (engine_of(folder, preset, dtype=str(dtype)[6:]) for preset in ("m4", "m3"))
    replaced = worker_of(fast).replacements
    assert reason in reasons(replaced, switch)
    assert worker_of(fast).model_runner.model.model.decoder_stack is None  # type: ignore[attr-defined]
    if dtype is torch.float32:
        jobs = [make_job(GapNaiveModel(folder), 20, 12, seed=1)]
        assert run_jobs(fast, jobs) == run_jobs(textbook, jobs) == [job.tokens for job in jobs]


def test_a_model_of_another_kind_stays_plain(ops: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to(BF16)
    replaced = accelerate(model, None, ON)
    assert replaced and all(item.after is None for item in replaced)
    assert "there is no LlamaModel in it" in reasons(replaced, "decoder_stack")


def test_forward_hooks_are_not_passed_by(ops: Any, tiny_model_dir: MakeTiny) -> None:
    arch = arch_of(tiny_model_dir("llama"))
    model = random_model(arch, BF16, CPU)
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert "forward hooks" in reasons(accelerate(model, paged(arch), ON), "decoder_stack")


def test_a_sampler_of_ones_own_stays_as_it_is(ops: Any, tiny_model_dir: MakeTiny) -> None:
    arch = arch_of(tiny_model_dir("llama"))
    replaced = accelerate(random_model(arch, BF16, CPU), paged(arch), ON, sampler=object())
    assert "no Sampler of ours" in reasons(replaced, "sampler_backend")


@pytest.mark.parametrize("switch", ["fused_ops", "fused_mlp", "decoder_stack"])
def test_a_demand_that_cannot_be_met_is_refused(switch: str, tiny_model_dir: MakeTiny) -> None:
    """True instead of "auto", for a model in fp16."""
    arch = arch_of(tiny_model_dir("llama"))
    kernels = dataclasses.replace(ON, **{switch: True})
    with pytest.raises(ValueError, match=rf"{switch}=True is impossible here: .*\. Use {switch}='auto' or False"):
        accelerate(random_model(arch, torch.float16, CPU), None, kernels)


# ---- linears, with and without a compiler


def load_tiny(folder: Path, dtype: torch.dtype, kernels: KernelConfig) -> LlamaForCausalLM:
    model = load_model(folder, load_hf_config(folder), dtype, CPU)
    accelerate(model, None, kernels)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama_tied_bias", "qwen3"])
def test_auto_swaps_every_layer(name: str, dtype: torch.dtype, ops: Any, tiny_model_dir: MakeTiny) -> None:
    model = load_tiny(tiny_model_dir(name), dtype, ON)
    assert impls(model) == {f"folovllm.{operator}.default" for operator in FUSED.values()}
    assert methods(model) <= {CppLinearMethod, CppGatedLinearMethod}
    tied = model.arch.tie_word_embeddings
    kept = [layer for layer in linears(model) if layer.weight is not None]
    assert kept == ([model.lm_head] if tied else []), "a packed weight is not kept twice, but for the embedding's"


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_compiler(
    dtype: torch.dtype, onednn: bool, tiny_model_dir: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's packing for bf16, where torch still has it, and else plain torch: the same logits as "torch" but for
    rounding.
    """
    monkeypatch.setattr(accelerate_module, "load_ops", lambda isa: None)
    works = onednn and packed_linear.onednn_packing_works()
    monkeypatch.setattr(packed_linear, "onednn_packing_works", lambda: works)
    folder = tiny_model_dir("llama_tied_bias")
    plain, auto = Bench(folder, dtype), Bench(folder, dtype)
    replaced = accelerate(auto.model, None, ON)
    packs = works and dtype is BF16
    assert methods(auto.model) == {OneDnnLinearMethod if packs else UnquantizedLinearMethod}
    assert impls(auto.model) == {"torch"} and "could not be built" in reasons(replaced, "fused_ops")
    wanted, got = plain.step({0: prompt(20)})[0].float(), auto.step({0: prompt(20)})[0].float()
    assert (got - wanted).abs().mean() <= 4 * UNIT[dtype] * wanted.abs().max()


def test_a_cpu_with_tiles_keeps_onednn(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_has_amx", lambda: True)
    monkeypatch.setattr(packed_linear, "onednn_packing_works", lambda: True)
    bf16, arena = torch.zeros(2, 2, dtype=BF16), HugeArena()
    assert isinstance(packed_linear.packed_method(bf16, ops, arena), OneDnnLinearMethod)
    assert isinstance(packed_linear.packed_method(bf16.float(), ops, arena), CppLinearMethod)  # no tiles for fp32
    assert "only bfloat16 gains" in str(packed_linear.packed_method(bf16.float(), None, arena))


def test_fp16_is_left_to_torch(ops: Any, tiny_model_dir: MakeTiny) -> None:
    model = load_tiny(tiny_model_dir("llama"), torch.float16, ON)
    assert methods(model) == {UnquantizedLinearMethod} and impls(model) == {"torch"}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_bf16_is_no_worse_than_torch(name: str, ops: Any, tiny_model_dir: MakeTiny) -> None:
    """Logits of a prompt and a decode step, against fp32: fewer roundings should not make them worse."""
    folder = tiny_model_dir(name)
    exact, torch_only, fast = Bench(folder), Bench(folder, BF16), Bench(folder, BF16)
    accelerate(fast.model, None, ON)
    errors = {}
    for bench in (exact, torch_only, fast):
        steps = [bench.step({0: prompt(40), 1: prompt(9, seed=1)}), bench.step({1: [7], 0: [8]})]
        errors[bench] = torch.cat([logits.float() for step in steps for logits in step.values()])
    wanted = errors.pop(exact)
    ours, theirs = ((errors[bench] - wanted).abs().mean().item() for bench in (fast, torch_only))
    assert 0 < ours <= 1.2 * theirs


# ---- tokens


def engine_of(folder: Path, preset: str, **args: Any) -> LLMEngine:
    small = {"max_model_len": 64, "kv_cache_memory": 2**20}
    config = EngineConfig.preset(preset, **(small | args)).resolve(load_hf_config(folder), "cpu")
    return LLMEngine(config, UniProcExecutor(config, folder), tokenizer=None)


def worker_of(engine: LLMEngine) -> Worker:
    executor = engine.engine_core.executor
    assert isinstance(executor, UniProcExecutor)
    return executor.worker


PRESETS = [rung.id for rung in milestones.engine_rungs()]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_in_fp32_every_preset_gives_the_same_greedy_tokens(name: str, tiny_model_dir: MakeTiny) -> None:
    folder = tiny_model_dir(name)
    oracle = GapNaiveModel(folder)
    jobs = [make_job(oracle, length, 16, seed) for seed, length in enumerate((1, 20, 33))]
    for preset in PRESETS:
        got = run_jobs(engine_of(folder, preset, dtype="float32"), jobs, late=1)
        assert got == [job.tokens for job in jobs], preset


@pytest.mark.parametrize("name", TINY_MODELS)
def test_in_bf16_the_rungs_below_m4_agree(name: str, tiny_model_dir: MakeTiny) -> None:
    """A lone request in m1 to m3, a batch in m2 and m3. From m4 on kernels round differently, so no more is claimed."""
    folder = tiny_model_dir(name)
    jobs = [make_job(GapNaiveModel(folder), length, 6, seed) for seed, length in enumerate((1, 20, 33))]
    engines = [engine_of(folder, preset, dtype="bfloat16") for preset in ("m1", "m2", "m3")]
    alone = [[run_jobs(engine, [job]) for job in jobs] for engine in engines]
    assert alone[0] == alone[1] == alone[2]
    assert run_jobs(engines[1], jobs, late=1) == run_jobs(engines[2], jobs, late=1)


@pytest.mark.parametrize("switch", MODEL_SWITCHES)
def test_in_fp32_no_switch_changes_a_token(switch: str, tiny_model_dir: MakeTiny) -> None:
    folder = tiny_model_dir("qwen3")
    jobs = [make_job(GapNaiveModel(folder), 20, 12, seed=3)]
    engine = engine_of(folder, "m4", dtype="float32", **{switch: OFF_VALUES[switch]})
    assert run_jobs(engine, jobs) == [job.tokens for job in jobs]


@pytest.mark.parametrize("preset", ["m3", "m4"])
def test_prompt_logprobs_beside_requests_that_want_none(preset: str, tiny_model_dir: MakeTiny) -> None:
    """In chunks of 7: all rows of the one request, the last rows of the others, none in mid-prompt; as when alone."""
    folder = tiny_model_dir("llama")
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 7, "dtype": "float32", "max_num_seqs": 4}
    oracle = GapNaiveModel(folder)
    jobs = [make_job(oracle, length, 8, seed) for seed, length in enumerate((17, 1, 20))]
    params = jobs[2].params.replace(prompt_logprobs=2)
    mixed, alone = engine_of(folder, preset, **chunks), engine_of(folder, preset, dtype="float32")
    wanted = finished(alone, [dataclasses.replace(jobs[2], params=params)])[0].prompt_logprobs
    outputs = finished(mixed, [*jobs[:2], dataclasses.replace(jobs[2], params=params)])
    assert [list(output.outputs[0].token_ids) for output in outputs] == [job.tokens for job in jobs]
    got = outputs[2].prompt_logprobs
    assert got is not None and wanted is not None and len(got) == len(wanted) == 20
    for ours, theirs in zip(got[1:], wanted[1:], strict=True):
        assert ours is not None and theirs is not None and ours.keys() == theirs.keys()
        for token in ours:
            assert ours[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4)


def test_a_model_that_returns_other_rows_is_refused(tiny_model_dir: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one's own that ignores `logits_indices` must not have its rows taken for others."""
    engine = engine_of(tiny_model_dir("llama"), "m3", dtype="float32")
    model: Any = worker_of(engine).model_runner.model
    monkeypatch.setattr(model.model, "run_layers", lambda hidden, residual, cos_sin: (hidden, residual))
    add_job(engine, make_job(GapNaiveModel(tiny_model_dir("llama")), 5, 2, seed=0), "a")
    with pytest.raises(ValueError, match="returned 5 rows of hidden states and 1 were selected: return the rows of"):
        engine.step()


def finished(engine: LLMEngine, jobs: list[Job]) -> list[Any]:
    done: dict[str, Any] = {}
    for i, job in enumerate(jobs):
        add_job(engine, job, str(i))
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step() if output.finished}
    return [done[str(i)] for i in range(len(jobs))]


# ---- what runs, as text


def test_llm_logs_what_runs_at_debug(
    ops: Any, tiny_model_dir: MakeTiny, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("folovllm.entrypoints.llm.Tokenizer.from_folder", lambda folder: None)
    with caplog.at_level(logging.DEBUG, logger="folovllm.entrypoints.llm"):
        llm = LLM(str(tiny_model_dir("llama")), dtype="bfloat16", max_model_len=64, kv_cache_memory=2**20)
    lines = [record.getMessage() for record in caplog.records]
    assert "attention: cpu_paged" in lines and f"threads: {torch.get_num_threads()}" in lines
    assert any(line.startswith("layers: 2 x QKVParallelLinear: CppLinearMethod") for line in lines)
    assert any(line.startswith("replaced: sampler_backend: torch sampling -> cpp sampling") for line in lines)
    assert llm.describe()["stays plain"], "heads of 24 are padded, so this model has no decoder stack"
