"""Scaled rotary embeddings: the context they allow, the table that holds them, and HuggingFace's tokens and logits.

Public reports: vllm pull 44738 and EricLBuehler/mistral.rs#44 (a table for a million positions, of which 512 are
used); Qwen's model cards ask for yarn to go beyond 32,768 tokens.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm import LLM, SamplingParams
from folovllm.config import EngineConfig
from folovllm.hf_config import load_hf_config, parse_hf_config
from folovllm.model_executor.layers.rotary_embedding import RotaryEmbedding, dynamic_frequencies, inverse_frequencies
from folovllm.rope_config import RopeConfig, parse_rope
from tests.tiny_models import build_hf_model, build_tokenizer

pytestmark = pytest.mark.m1

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
ORIGINAL = 64  # positions of the tiny models before they are stretched
LIMITS = {"dtype": "float32", "kv_cache_memory": 32 * 2**20}

YARNS: list[dict[str, Any]] = [
    {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "attention_factor": 0.8},
    {"factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 16, "beta_slow": 2},
    {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "truncate": False, "beta_fast": 3},
    {"factor": 4.0},  # the original context is max_position_embeddings
]


def config_of(rope: dict[str, Any], **changes: Any) -> dict[str, Any]:
    config = json.loads((CONFIGS / "Qwen2.5-0.5B-Instruct.json").read_text())
    return config | {"rope_scaling": rope} | changes


# --- What config.json says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rope,positions,context",
    [
        ({"rope_type": "default"}, 32768, 32768),
        ({"type": "linear", "factor": 2.0}, 32768, 65536),
        ({"type": "dynamic", "factor": 2.5}, 4096, 10240),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072, 131072),
        ({"type": "yarn", "factor": 2.0}, 32768, 65536),
        ({"type": "yarn", "original_max_position_embeddings": 4096}, 16384, 16384),  # the factor is their ratio
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            131072,
            131072,
        ),
    ],
)
def test_the_context_that_a_scaling_allows(rope: dict[str, Any], positions: int, context: int) -> None:
    """As in vLLM's _get_and_verify_max_len."""
    arch = parse_hf_config(config_of(rope, max_position_embeddings=positions, sliding_window=None))
    assert arch.max_context_len == context
    assert EngineConfig.from_args().resolve(arch, "cpu").max_model_len == context
    with pytest.raises(ValueError, match=f"max_model_len={context + 1} is more than the model's {context} positions"):
        EngineConfig.from_args(max_model_len=context + 1).resolve(arch, "cpu")


def test_a_refused_length_shows_the_numbers_it_follows_from() -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    arch = parse_hf_config(config_of(rope))
    message = r"131072 positions \(max_position_embeddings=32768, rope_type='yarn' with factor 4\); use at most 131072"
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_args(max_model_len=200_000).resolve(arch, "cpu")


@pytest.mark.parametrize(
    "rope,message",
    [
        ({"type": "su", "short_factor": [1.0], "long_factor": [1.0]}, "a rope_type of .* found 'su'"),
        ({"rope_type": "longrope"}, "a rope_type of .* found 'longrope'"),
        ({"rope_type": "yarn", "factor": "4"}, "a positive number as 'factor'; found '4'"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2}, "beta_fast of at least beta_slow"),
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0}, "'attention_factor'; found -1.0"),
        ({"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.7}, "with its own keys; found 'attn_factor': 0.7"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": 1}, "true or false as 'truncate'"),
        ({"rope_type": "dynamic"}, "expected 'factor'"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "with its own keys; found 'alpha'"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "with its own keys; found 'mrope_section'"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"full_attention": {"factor": 2.0}, "sliding_attention": {}}, "one rotary embedding for all layers"),
        ("yarn", "an object as 'rope_scaling'"),
    ],
)
def test_scalings_that_cannot_run_are_refused(rope: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_hf_config(config_of(rope))
    assert "to fix it:" in str(caught.value)


def test_keys_without_use_are_named(caplog: pytest.LogCaptureFixture) -> None:
    parse_rope({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "facotr": 4.0}})
    assert "rope_type 'linear' has no use for facotr" in caplog.text


# --- Frequencies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", YARNS, ids=str)
def test_yarn_is_huggingfaces(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "yarn", "rope_theta": 10000.0, **rope}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=32, max_position_embeddings=ORIGINAL, rope_parameters=dict(parameters))
    )
    ours = parse_rope({"rope_parameters": parameters, "max_position_embeddings": ORIGINAL})
    torch.testing.assert_close(inverse_frequencies(32, ours), theirs.inv_freq, atol=0, rtol=1e-6)
    positions = torch.tensor([0, 1, 63, 64, 255])
    cos, sin = theirs(torch.zeros(1), positions[None])
    our_cos, our_sin = RotaryEmbedding(32, 256, ours).cos_sin_at(positions, torch.float32)
    torch.testing.assert_close(our_cos[:, 0], cos[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(our_sin[:, 0, 16:], sin[0, :, 16:], atol=2e-6, rtol=0)


def test_dynamic_frequencies_are_huggingfaces_for_that_length() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = LlamaConfig(head_dim=32, max_position_embeddings=ORIGINAL, rope_parameters=parameters)
    theirs, ours = LlamaRotaryEmbedding(config), RopeConfig(10000.0, "dynamic", 4.0, 1.0, 4.0, ORIGINAL)
    torch.testing.assert_close(inverse_frequencies(32, ours), theirs.inv_freq, atol=0, rtol=1e-6)
    theirs(torch.zeros(1), torch.arange(200)[None])
    torch.testing.assert_close(dynamic_frequencies(32, ours, 200), theirs.inv_freq, atol=0, rtol=1e-6)


def test_dynamic_table_has_plain_rows_first_and_stretched_ones_after() -> None:
    rope = RopeConfig(10000.0, "dynamic", 4.0, 1.0, 4.0, ORIGINAL)
    rotary = RotaryEmbedding(8, ORIGINAL, rope)
    rotary.build(256, torch.float32, torch.device("cpu"))
    assert rotary.cos_sin.shape == (ORIGINAL + 256, 2, 8) and rope.long_request_offset(256) == ORIGINAL
    plain = RotaryEmbedding(8, ORIGINAL, RopeConfig(10000.0)).cos_sin_at(torch.arange(ORIGINAL), torch.float32)
    assert torch.equal(rotary.cos_sin[:ORIGINAL, :1], plain[0])
    angles = torch.outer(torch.arange(256.0), dynamic_frequencies(8, rope, 256))
    torch.testing.assert_close(rotary.cos_sin[ORIGINAL:, 0, :4], angles.cos())
    rotary.build(ORIGINAL, torch.float32, torch.device("cpu"))
    assert rotary.cos_sin.shape[0] == ORIGINAL and rope.long_request_offset(ORIGINAL) is None


# --- In the engine ----------------------------------------------------------------------------------------------------


def make_model(folder: Path, base: str, rope: dict[str, Any], positions: int = ORIGINAL) -> tuple[Path, Any]:
    """A tiny model whose config.json has these rotary settings, and HuggingFace's model of it."""
    from transformers import AutoModelForCausalLM

    build_hf_model(base).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_parameters": {"rope_theta": 10000.0, **rope}, "max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    inputs = torch.tensor([prompt])
    args = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return model.generate(inputs, attention_mask=torch.ones_like(inputs), **args)[0, len(prompt) :].tolist()


def prompt_of(length: int) -> list[int]:
    return torch.randint(3, 264, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def greedy(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **changes)


@pytest.mark.parametrize("base", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("preset", ["m1", None])
def test_yarn_gives_huggingfaces_tokens_and_logits(base: str, preset: str | None, tmp_path: Path) -> None:
    folder, theirs = make_model(tmp_path / "m", base, {"rope_type": "yarn", **YARNS[0]})
    llm = LLM(str(folder), preset=preset, **LIMITS)
    assert llm.config.max_model_len == 4 * ORIGINAL
    for length in (5, 150):  # within the original context and far beyond it
        prompt = prompt_of(length)
        output = llm.generate([prompt], greedy(12, prompt_logprobs=0), use_tqdm=False)[0]
        assert output.outputs[0].token_ids == hf_greedy(theirs, prompt, 12)
        with torch.no_grad():
            wanted = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)  # [length, vocab_size]
        ours = [output.prompt_logprobs[i + 1][prompt[i + 1]].logprob for i in range(length - 1)]
        wanted = wanted[torch.arange(length - 1), prompt[1:]]
        torch.testing.assert_close(torch.tensor(ours), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("preset", ["m1", None])
def test_dynamic_gives_huggingfaces_tokens_within_the_original_context(preset: str | None, tmp_path: Path) -> None:
    folder, theirs = make_model(tmp_path / "m", "llama", {"rope_type": "dynamic", "factor": 4.0})
    llm = LLM(str(folder), preset=preset, **LIMITS)
    assert llm.config.max_model_len == 4 * ORIGINAL
    for length in (5, ORIGINAL - 12):
        got = llm.generate([prompt_of(length)], greedy(12), use_tqdm=False)[0].outputs[0].token_ids
        assert got == hf_greedy(theirs, prompt_of(length), 12)


def test_long_requests_under_dynamic_scaling_have_vllms_frequencies(tmp_path: Path) -> None:
    """All their positions turn by the frequencies of max_model_len, whatever the chunks and the other requests.

    The judge is HuggingFace's model of the same weights with these frequencies as its only ones.
    """
    folder, theirs = make_model(tmp_path / "m", "llama", {"rope_type": "dynamic", "factor": 4.0})
    rope = load_hf_config(folder).rope
    theirs.model.rotary_emb.rope_type = "default"  # no more updates
    theirs.model.rotary_emb.inv_freq = dynamic_frequencies(24, rope, 4 * ORIGINAL)
    prompts = [prompt_of(100)[:50], prompt_of(100), prompt_of(60)]  # the last one may grow beyond the original context
    wanted = [[], hf_greedy(theirs, prompts[1], 12), hf_greedy(theirs, prompts[2], 30)]
    theirs.model.rotary_emb.inv_freq = inverse_frequencies(24, rope)
    wanted[0] = hf_greedy(theirs, prompts[0], 8)
    llm = LLM(str(folder), max_num_batched_tokens=40, **LIMITS)
    params = [greedy(8), greedy(12), greedy(30)]
    for _ in range(2):  # the second time from the prefix cache, where equal tokens of other frequencies must not meet
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == wanted
    many = SamplingParams(n=2, temperature=1.0, top_k=1, max_tokens=12, ignore_eos=True)
    assert [c.token_ids for c in llm.generate(prompts[1], many, use_tqdm=False)[0].outputs] == [wanted[1]] * 2


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_the_table_covers_max_model_len_and_is_there_before_the_first_token(load_format: str, tmp_path: Path) -> None:
    folder, _ = make_model(tmp_path / "m", "llama", {"rope_type": "default"}, positions=2**20)
    llm = LLM(str(folder), max_model_len=512, load_format=load_format, **LIMITS)
    table = llm.llm_engine.engine_core.executor.worker.model_runner.model.model.rotary_emb.cos_sin
    assert table.shape == (512, 2, 24) and table.dtype is torch.float32
    at_the_end = llm.generate([prompt_of(500)], greedy(12), use_tqdm=False)[0]  # up to the last position
    assert len(at_the_end.outputs[0].token_ids) == 12


def test_the_table_is_allocated_before_the_kv_cache_is_sized(
    tiny_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from folovllm.worker.worker import Worker

    seen = []
    free_memory = Worker._free_memory

    def watched(worker: Worker) -> int:
        seen.append(worker.model_runner.model.model.rotary_emb.cos_sin is not None)
        return free_memory(worker)

    monkeypatch.setattr(Worker, "_free_memory", watched)
    LLM(str(tiny_model_dir("llama")), dtype="float32")
    assert seen and all(seen)
