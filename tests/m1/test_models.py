"""Our models against HuggingFace's, on tiny random ones of every architecture (R1.14 to R1.17)."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.forward_context import set_forward_context
from folovllm.hf_config import RopeConfig, load_hf_config
from folovllm.model_executor.layers.activation import SiluAndMul
from folovllm.model_executor.layers.layernorm import RMSNorm
from folovllm.model_executor.layers.rotary_embedding import RotaryEmbedding, apply_rotary, inverse_frequencies
from folovllm.model_executor.model_loader import load_model
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

pytestmark = pytest.mark.m1

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


BLOCK_SIZE, BLOCKS_PER_REQ, MAX_REQS = 8, 20, 3


class Bench:
    """A loaded model with a small paged cache; `step` computes the next tokens of some requests together."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        arch = load_hf_config(folder)
        self.model = load_model(folder, arch, dtype, CPU)
        heads = (arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim)
        spec = AttentionSpec(*heads, dtype, CPU, BLOCK_SIZE)
        self.backend = TorchNaiveBackend(spec)
        num_blocks = MAX_REQS * BLOCKS_PER_REQ
        for layer in self.model.attention_layers():
            # NaN, so that reading a slot that was never written shows.
            cache = torch.full(self.backend.kv_cache_shape(num_blocks), float("nan"), dtype=dtype)
            layer.bind(self.backend, cache)
        # Scattered pages: request r owns blocks r, r + 3, r + 6, ... in reverse order.
        self.block_table = torch.arange(num_blocks).view(-1, MAX_REQS).T.flip(1).int()
        self.lengths = [0] * MAX_REQS

    def step(self, tokens: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """request -> its new tokens; back come the logits of each, [num_new_tokens, vocab_size]."""
        requests, counts = list(tokens), [len(t) for t in tokens.values()]
        positions, slots = [], []
        for r in requests:
            new = torch.arange(self.lengths[r], self.lengths[r] + len(tokens[r]))
            positions.append(new)
            slots.append(self.block_table[r][new // BLOCK_SIZE].long() * BLOCK_SIZE + new % BLOCK_SIZE)
            self.lengths[r] += len(tokens[r])
        metadata = AttentionMetadata(
            query_start_loc=[0, *torch.tensor(counts).cumsum(0).tolist()],
            seq_lens=[self.lengths[r] for r in requests],
            block_table=self.block_table[requests],
            slot_mapping=torch.cat(slots),
            block_size=BLOCK_SIZE,
        )
        self.backend.prepare(metadata)
        input_ids = torch.tensor([t for new in tokens.values() for t in new])
        with torch.inference_mode(), set_forward_context(metadata):
            hidden = self.model(input_ids, torch.cat(positions))
            logits = self.model.compute_logits(hidden)
        return dict(zip(requests, logits.split(counts), strict=True))


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def hf_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def hf_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    return hf_model(folder)(torch.tensor([tokens])).logits[0]  # [num_tokens, vocab_size]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_equal_huggingface(name: str, tiny_model_dir: Any) -> None:
    tokens = prompt(100)
    ours, theirs = Bench(tiny_model_dir(name)).step({0: tokens})[0], hf_logits(tiny_model_dir(name), tokens)
    assert theirs.std() > 1.0  # else agreeing within 1e-4 says little
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_64_greedy_tokens_equal_huggingface(name: str, tiny_model_dir: Any) -> None:
    tokens = prompt(12, seed=1)
    model = hf_model(tiny_model_dir(name))
    model.generation_config.eos_token_id = None  # go on to the end
    theirs = model.generate(torch.tensor([tokens]), max_new_tokens=64, do_sample=False)[0, len(tokens) :].tolist()
    bench, ours, new = Bench(tiny_model_dir(name)), [], tokens
    for _ in range(64):
        new = [int(bench.step({0: new})[0][-1].argmax())]
        ours += new
    assert len(set(theirs)) > 8, "the text is a short loop and proves little"
    assert ours == theirs


@pytest.mark.parametrize("name", TINY_MODELS)
def test_prefill_then_decode_equals_the_full_pass(name: str, tiny_model_dir: Any) -> None:
    tokens = prompt(40, seed=2)
    full = Bench(tiny_model_dir(name)).step({0: tokens})[0]
    bench = Bench(tiny_model_dir(name))
    pieces = [tokens[:17], tokens[17:25], *([t] for t in tokens[25:])]  # a prompt, a chunk, single tokens
    cached = torch.cat([bench.step({0: piece})[0] for piece in pieces])
    torch.testing.assert_close(cached, full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_ragged_sequences_together_equal_alone(name: str, tiny_model_dir: Any) -> None:
    first, second = prompt(37, seed=3), prompt(21, seed=4)
    alone = [Bench(tiny_model_dir(name)).step({0: tokens})[0] for tokens in (first, second)]
    bench = Bench(tiny_model_dir(name))
    start = bench.step({2: second[:5]})[2]  # the second is ahead, on other pages
    together = bench.step({0: first, 2: second[5:20]})
    last = bench.step({2: second[20:]})[2]
    torch.testing.assert_close(together[0], alone[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat((start, together[2], last)), alone[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_stays_near_fp32(name: str, dtype: torch.dtype, tolerance: float, tiny_model_dir: Any) -> None:
    tokens = prompt(60, seed=5)
    reference = Bench(tiny_model_dir(name)).step({0: tokens})[0]
    logits = Bench(tiny_model_dir(name), dtype).step({0: tokens})[0]
    assert logits.dtype == dtype
    assert (logits.float() - reference).abs().mean() < tolerance * reference.std()


def test_attention_layers_come_in_layer_order(tiny_model_dir: Any) -> None:
    model = Bench(tiny_model_dir("llama_rope")).model
    assert model.attention_layers() == [layer.self_attn.attn for layer in model.model.layers]
    assert len(model.attention_layers()) == 3


def test_tied_head_shares_the_embedding(tiny_model_dir: Any) -> None:
    model = Bench(tiny_model_dir("qwen3")).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert sum(p.numel() for p in model.parameters()) == model.arch.num_parameters()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_parameter_count_is_the_configs(name: str, tiny_model_dir: Any) -> None:
    model = Bench(tiny_model_dir(name)).model
    assert sum(p.numel() for p in model.parameters()) == model.arch.num_parameters()
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


# --- Layers against HuggingFace's -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rmsnorm_equals_huggingface(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = torch.randn(33, 96, dtype=torch.float64) * 3, torch.rand(96, dtype=torch.float64) + 0.5
    theirs, ours, exact = LlamaRMSNorm(96, 1e-5).to(dtype), RMSNorm(96, 1e-5).to(dtype), LlamaRMSNorm(96, 1e-5)
    for norm in (theirs, ours, exact):
        norm.weight.data.copy_(weight.to(dtype))
    wanted = exact(x.to(dtype).float())
    our_error, their_error = (norm(x.to(dtype)).float() - wanted for norm in (ours, theirs))
    assert our_error.abs().mean() <= their_error.abs().mean() + 1e-7
    assert our_error.abs().max() <= their_error.abs().max() + 1e-6


def test_rmsnorm_adds_the_residual_first_and_in_place() -> None:
    norm = RMSNorm(8, 1e-5)
    norm.weight.data.fill_(2.0)
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    total = x + residual
    out, returned = norm(x, residual)
    assert returned is residual and torch.equal(residual, total) and torch.equal(out, norm(total))


def test_silu_and_mul() -> None:
    gate, up = torch.randn(5, 6), torch.randn(5, 6)
    kept = torch.cat((gate, up), dim=1)
    torch.testing.assert_close(SiluAndMul()(kept), gate * torch.sigmoid(gate) * up)
    assert torch.equal(kept, torch.cat((gate, up), dim=1))  # the input stays as it was


ROPES = [
    RopeConfig(10000.0),
    RopeConfig(10000.0, "linear", 4.0),
    RopeConfig(5000.0, "llama3", 8.0, 1.0, 4.0, 64),
    RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: f"{r.rope_type}-{r.factor:g}")
def test_rotary_equals_huggingface(rope: RopeConfig) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    parameters = {"rope_theta": rope.theta, "rope_type": rope.rope_type, "factor": rope.factor}
    if rope.rope_type == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        parameters |= {"original_max_position_embeddings": rope.original_max_position_embeddings}
    config = LlamaConfig(head_dim=32, max_position_embeddings=2048, rope_parameters=parameters)
    positions = torch.tensor([0, 1, 5, 63, 64, 500, 2047])
    q, k = torch.randn(7, 6, 32), torch.randn(7, 2, 32)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    wanted_q, wanted_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    rows = RotaryEmbedding(32, 2048, rope).cos_sin_at(positions, torch.float32)
    torch.testing.assert_close(apply_rotary(q, *rows), wanted_q[0].transpose(0, 1), atol=2e-6, rtol=0)
    torch.testing.assert_close(apply_rotary(k, *rows), wanted_k[0].transpose(0, 1), atol=2e-6, rtol=0)


def test_llama3_scaling_bends_only_slow_pairs() -> None:
    plain = inverse_frequencies(32, RopeConfig(5000.0))
    ratio = inverse_frequencies(32, ROPES[2]) / plain
    assert ratio[0] == 1.0 and ratio[-1].item() == pytest.approx(1 / 8)
    assert ((ratio > 1 / 8) & (ratio < 1)).any(), "no pair is in the interpolated band: the case proves too little"


def test_rotary_table_is_computed_in_fp32_even_for_bf16() -> None:
    cos, _ = RotaryEmbedding(8, 4096, RopeConfig(10000.0)).cos_sin_at(torch.tensor([4001]), torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert cos[0, 0, 0].item() == pytest.approx(math.cos(4001.0), abs=4e-3)
