"""A factory of tiny HuggingFace models with odd shapes, one per thing a real architecture can do differently.

They are made with transformers itself, so it is the judge of what the weights mean. Random weights at transformers'
usual scale of 0.02 would prove little: attention nearly uniform, biases zero, norms one, the same token for ever. Here
weights are large enough that every part of the model moves the logits and greedy text wanders.
"""

from pathlib import Path
from typing import Any

import torch

# New names go to the end: the place of a name is the seed of its weights.
TINY_MODELS = ("llama", "llama_rope", "llama_tied_bias", "qwen2", "qwen3", "mistral", "llama_sharded")

VOCAB_SIZE = 264  # 3 special tokens, 256 bytes, 5 merges
BOS, EOS, PAD = 0, 2, 1
MERGES = [("t", "h"), ("h", "e"), ("i", "n"), ("e", "r"), ("Ġ", "t")]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny(name: str, folder: Path) -> Path:
    """Write the tiny model `name` (one of TINY_MODELS) to `folder`/`name`, ready for `LLM(path)`."""
    target = folder / name
    model = build_hf_model(name)
    # 40 kB shards: dozens of files, with q, k and v of one layer in different ones.
    model.save_pretrained(target, max_shard_size="40KB" if name == "llama_sharded" else "5GB")
    build_tokenizer().save_pretrained(target)
    return target


def build_hf_model(name: str) -> Any:
    """The HuggingFace model itself, fp32, the same weights every time."""
    family, changes = _recipe(name)
    return random_hf_model(family, TINY_MODELS.index(name), **changes)


def random_hf_model(family: str, seed: int, **changes: Any) -> Any:
    """A model of `family` ("Llama", "Qwen2" ...) with the usual tiny sizes, but for `changes`."""
    import transformers

    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**_common() | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        _liven(model)
    return model


def _common() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 56,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def _recipe(name: str) -> tuple[str, dict[str, Any]]:
    """Family, and what is odd about this one."""
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 32, "rope_theta": 1000.0}  # 32: our tests go well beyond it
    return {
        "llama": ("Llama", {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 24}),
        "llama_rope": ("Llama", {"num_hidden_layers": 3, "head_dim": 16, "rope_parameters": llama3}),
        "llama_tied_bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        "llama_sharded": ("Llama", {"num_hidden_layers": 3}),
        "qwen2": ("Qwen2", {"num_attention_heads": 7, "num_key_value_heads": 7, "use_sliding_window": False}),
        "qwen3": ("Qwen3", {"num_attention_heads": 6, "head_dim": 20, "tie_word_embeddings": True}),
        "mistral": ("Mistral", {"num_attention_heads": 8, "head_dim": None, "hidden_size": 64, "sliding_window": None}),
    }[name]


def _liven(model: Any) -> None:
    """Biases start at zero and norms at one: a loader that forgot them would pass."""
    for name, param in model.named_parameters():
        if name.endswith(".bias"):
            param.data.normal_(0.0, 0.3)
        elif "norm" in name:
            param.data.uniform_(0.6, 1.6)


def build_tokenizer() -> Any:
    """Byte-level BPE with five merges: any text encodes, and most tokens are one byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = specials + alphabet + [a + b for a, b in MERGES]
    vocab = {token: index for index, token in enumerate(tokens)}
    assert len(vocab) == VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|im_start|>",
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
