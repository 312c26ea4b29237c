"""Our models against HuggingFace's, on tiny random ones of every architecture (milestone M1, issue 2 point 5.1)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.forward_context import set_forward_context
from folovllm.hf_config import load_hf_config
from folovllm.model_executor.model_loader import load_model
from tests.tiny_models import TINY_MODELS, VOCAB_SIZE

pytestmark = pytest.mark.m1

CPU = torch.device("cpu")
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
