"""The whole conversion on a GGUF of one tiny layer that the test writes itself: no network, a few seconds.

It also guards the real one: a machine that pulled once never converts the default model again.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from folovllm.hub import ALIASES, PullError, check_model_folder
from folovllm.hub.aliases import Alias
from folovllm.hub.convert import convert_gguf

pytestmark = pytest.mark.m0

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 32, 4, 2, 8, 64
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def byte_tokens() -> list[str]:
    """The 256 printable stand-ins byte-level BPE writes bytes as."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_gguf(path: Path, template: str | None = TEMPLATE) -> dict[str, np.ndarray]:
    """A llama GGUF with random fp32 tensors; returns them under their GGUF names."""
    from gguf import GGUFWriter, TokenType

    tokens = [*SPECIAL, *byte_tokens(), "ĊĊ"]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    if template is not None:
        writer.add_chat_template(template)
    tensors = random_tensors(len(tokens))
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def random_tensors(vocab: int) -> dict[str, np.ndarray]:
    kv = KV_HEADS * HEAD_DIM
    shapes = {"token_embd": (vocab, HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,)}
    shapes |= {"blk.0.ffn_norm": (HIDDEN,), "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (kv, HIDDEN)}
    shapes |= {"blk.0.attn_v": (kv, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN)}
    shapes |= {"blk.0.ffn_gate": (INNER, HIDDEN), "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER)}
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def alias() -> Alias:
    facts = {"hidden_size": HIDDEN, "num_key_value_heads": KV_HEADS, "rope_theta": 5000.0, "vocab_size": 260}
    facts |= {"tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return replace(ALIASES["smollm2-135m"], name="tiny", config_facts=facts)


@pytest.fixture(scope="module")
def converted(alias: Alias, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    root = tmp_path_factory.mktemp("convert")
    tensors = write_gguf(root / "tiny.gguf")
    out = root / "out"
    out.mkdir()
    convert_gguf(root / "tiny.gguf", out, alias)
    return out, tensors


def interleaved_to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Head rows: GGUF keeps rotary pairs as (0, 1), (2, 3), ..., HuggingFace as (0, d/2), (1, d/2 + 1), ..."""
    pairs = weight.reshape(heads, HEAD_DIM // 2, 2, HIDDEN)  # [heads, pair, which of the two, hidden]
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def test_every_weight_arrives_unchanged(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    from safetensors.numpy import load_file

    out, tensors = converted
    weights = load_file(out / "model.safetensors")
    assert len(weights) == len(tensors) and "lm_head.weight" not in weights
    layer = "model.layers.0"
    pairs = {
        "model.embed_tokens": tensors["token_embd.weight"],
        "model.norm": tensors["output_norm.weight"],
        f"{layer}.input_layernorm": tensors["blk.0.attn_norm.weight"],
        f"{layer}.self_attn.q_proj": interleaved_to_halves(tensors["blk.0.attn_q.weight"], HEADS),
        f"{layer}.self_attn.k_proj": interleaved_to_halves(tensors["blk.0.attn_k.weight"], KV_HEADS),
        f"{layer}.self_attn.v_proj": tensors["blk.0.attn_v.weight"],
        f"{layer}.self_attn.o_proj": tensors["blk.0.attn_output.weight"],
        f"{layer}.post_attention_layernorm": tensors["blk.0.ffn_norm.weight"],
        f"{layer}.mlp.gate_proj": tensors["blk.0.ffn_gate.weight"],
        f"{layer}.mlp.up_proj": tensors["blk.0.ffn_up.weight"],
        f"{layer}.mlp.down_proj": tensors["blk.0.ffn_down.weight"],
    }
    for name, value in pairs.items():
        np.testing.assert_array_equal(weights[f"{name}.weight"], value, err_msg=name)


def test_the_folder_is_a_model_folder(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    out, _ = converted
    assert check_model_folder(out) == out
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 5000.0
    assert config["dtype"] == "bfloat16" and str(out.parent) not in json.dumps(config)
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1  # the weights are as readable as the rest


def test_the_tokenizer_keeps_whitespace_before_digits(converted: tuple[Path, dict[str, np.ndarray]]) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    out, _ = converted
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("x\n\n12<|im_end|>").tokens == ["x", "ĊĊ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("é <|im_end|>").ids) == "é "  # special tokens are marked as special
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded("x\n\n12").input_ids == tokenizer.encode("x\n\n12").ids
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id) == (1, 2, 2, 0)
    assert loaded.apply_chat_template([{"content": "hi"}], tokenize=False) == "<|im_start|>hi<|im_end|>"


def test_a_gguf_without_a_chat_template_is_refused(alias: Alias, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", template=None)
    with pytest.raises(PullError, match=r"tiny.gguf: expected a chat template in its metadata; found none"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path, alias)
