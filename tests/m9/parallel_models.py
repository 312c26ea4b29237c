"""Tiny models whose sizes divide among 2 and 4 ranks, one per thing that several ranks can get wrong."""

from pathlib import Path
from typing import Any

from tests.tiny_models import build_tokenizer, random_hf_model

SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 128,  # whole blocks of 32 outputs on 4 ranks: SiLU-mul can be part of the multiplication
    "num_hidden_layers": 3,  # 2 stages: 2 and 1
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # 4 ranks: each KV head is on two of them
    "head_dim": 16,  # what cpu_paged wants, so that a stage can have a decoder stack
}
# The vocabulary of 264 is 66 for each of 4 ranks.
PARALLEL_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # The biases of o_proj and down_proj must be added once. Sizes that no kernel likes.
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "intermediate_size": 72}),
    "one_kv_head": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),  # on all ranks
    "qwen2": ("Qwen2", {"num_key_value_heads": 4, "use_sliding_window": False}),
    "qwen3": ("Qwen3", {"num_attention_heads": 8, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": None}),
}


def make_parallel(name: str, folder: Path) -> Path:
    """Writes the model `name` (one of PARALLEL_MODELS) to `folder`/`name`, ready for `LLM(path)`."""
    family, changes = PARALLEL_MODELS[name]
    model = random_hf_model(family, seed=100 + list(PARALLEL_MODELS).index(name), **SIZES | changes)
    model.save_pretrained(folder / name)
    build_tokenizer().save_pretrained(folder / name)
    return folder / name
