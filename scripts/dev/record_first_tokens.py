"""Records what SmolLM2-135M-Instruct computes for the three requests of the pages, as docs/data/first_tokens.json.

Milestone: M1. vLLM counterpart: none. It needs the weights (`folovllm pull smollm2-135m`) and takes a minute:

    python scripts/dev/record_first_tokens.py

fp32, plain torch, without a KV cache (folovllm/worker/naive.py). The pictures of docs/learn/00_start_here and
01_basic_inference show these numbers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from folovllm.attention.backends.no_cache import NoCacheBackend
from folovllm.engine.tokenizer import Tokenizer
from folovllm.hub import find_model
from folovllm.learn.three_requests import EXAMPLES
from folovllm.sample.ops import topk_topp
from folovllm.worker.naive import NaiveModel

OUT = Path(__file__).parents[2] / "docs/data/first_tokens.json"
HEADS = ((11, 1), (23, 4))  # (layer, query head)
TEMPERATURE, TOP_K, TOP_P = 0.7, 6, 0.85


def main() -> None:
    torch.set_num_threads(1)
    OUT.write_text(json.dumps(record(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {OUT.name}")


def record() -> dict[str, Any]:
    """What the file holds, computed anew."""
    folder = find_model("smollm2-135m")
    model = NaiveModel(folder)
    pieces = token_texts(folder)
    next_tokens = {}
    for name, example in EXAMPLES.items():
        for index in range(example.max_tokens):
            logits = model.logits([*example.prompt_token_ids, *example.answer_token_ids[:index]])[0]  # [vocab_size]
            probabilities, ids = logits.softmax(dim=-1).topk(5)
            assert int(ids[0]) == example.answer_token_ids[index], (name, index)
            texts = [pieces(i) for i in ids.tolist()]
            next_tokens[f"{name}{index}"] = [[t, round(float(p), 4)] for t, p in zip(texts, probabilities, strict=True)]
    return {
        "command": "python scripts/dev/record_first_tokens.py",
        "model": "SmolLM2-135M-Instruct, fp32",
        "next_tokens": next_tokens,
        "attention": {f"{layer}.{head}": weights for (layer, head), weights in attention_weights(model).items()},
        "sampling": sampling_stages(model, pieces),
    }


def token_texts(folder: Path) -> Callable[[int], str]:
    """A function from a token id to its text."""
    tokenizer = Tokenizer.from_folder(folder)
    return lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False)


def attention_weights(model: NaiveModel) -> dict[tuple[int, int], list[list[float]]]:
    """The weights [5, 5] with which request a's prompt attends to itself, in the heads of HEADS."""
    found: dict[tuple[int, int], list[list[float]]] = {}

    class Recorder(NoCacheBackend):
        layer = 0

        def forward(self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any) -> torch.Tensor:
            group = self.spec.num_queries_per_kv
            for layer, head in HEADS:
                if layer == self.layer:
                    scores = query[:, head].float() @ self.key[:, head // group].float().T * self.spec.scale  # [n, n]
                    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
                    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)  # [n, n]
                    found[layer, head] = [[round(float(w), 4) for w in row] for row in weights]
            return super().forward(query, kv_cache, metadata)

    for index, layer in enumerate(model.model.attention_layers()):
        recorder = Recorder(layer.backend.spec)
        recorder.layer = index
        layer.bind(recorder, torch.empty(0))
    model.logits(list(EXAMPLES["a"].prompt_token_ids))
    return found


def sampling_stages(model: NaiveModel, pieces: Callable[[int], str]) -> dict[str, Any]:
    """The distribution of the token after "Once upon a time," after each step of the sampler, by the sampler's code."""
    example = EXAMPLES["b"]
    logits = model.logits([*example.prompt_token_ids, example.answer_token_ids[0]]).clone()  # [1, vocab_size]
    shown = logits[0].topk(8).indices  # [8]
    stages = []

    def after(title: str) -> None:
        probabilities = logits.softmax(dim=-1)[0]  # [vocab_size]
        kept = [round(float(p), 4) for p in probabilities[shown]]
        others = probabilities.clone()
        others[shown] = 0
        stages.append(
            {
                "title": title,
                "probabilities": kept,
                "others": round(float(others.sum()), 4),
                "others_left": int((others > 0).sum()),
            }
        )

    after("as the model gave it")
    topk_topp.apply_temperature_(logits, torch.tensor([TEMPERATURE]))
    after(f"temperature {TEMPERATURE}")
    topk_topp.apply_top_k_(logits, torch.tensor([TOP_K]), TOP_K)
    after(f"top_k {TOP_K}")
    topk_topp.apply_top_p_(logits, torch.tensor([TOP_P]))
    after(f"top_p {TOP_P}")
    return {"pieces": [pieces(i) for i in shown.tolist()], "stages": stages}


if __name__ == "__main__":
    main()
