"""The half of these tests that runs with the project's own .venv: models, expected answers, HuggingFace's numbers.

Milestone: M8. One JSON line on stdin, one JSON line (the last) on stdout. `project(NAME, **arguments)` in conftest.py
calls a function of this file in a process of its own.
"""

import json
import sys
from pathlib import Path
from typing import Any


def model_folder(model: str) -> str:
    """Where the weights are; pulls them if they are missing."""
    from folovllm.hub import find_model

    return str(find_model(model, pull=True))


def tiny_model(folder: str, max_position_embeddings: int) -> str:
    """A random model of two layers with a byte-level tokenizer, which the server serves like any other folder."""
    from tests.tiny_models import make_tiny

    path = make_tiny("llama", Path(folder))
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = max_position_embeddings
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def generate(model: str, prompts: list[Any], max_tokens: list[int], alone: bool = False, **options: Any) -> list[Any]:
    """Greedy answers of the offline engine in fp32: text, token ids and logprobs. `alone`: one request at a time."""
    from folovllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", **({"max_num_seqs": 1} if alone else {}))
    params = [SamplingParams(temperature=0, max_tokens=count, logprobs=0, **options) for count in max_tokens]
    given = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
    answers = [output.outputs[0] for output in llm.generate(given, params, use_tqdm=False)]
    return [
        {
            "text": answer.text,
            "token_ids": list(answer.token_ids),
            "logprobs": [at[token].logprob for at, token in zip(answer.logprobs, answer.token_ids, strict=True)],
            "finish_reason": answer.finish_reason,
        }
        for answer in answers
    ]


def loglikelihoods(model: str, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """HuggingFace's log probability of each continuation after its context, and whether it is the greedy one (fp32)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results = []
    for context, continuation in pairs:
        num_context = len(tokenizer.encode(context, add_special_tokens=False))
        ids = tokenizer.encode(context + continuation, add_special_tokens=False)
        with torch.inference_mode():
            logits = network(torch.tensor([ids])).logits[0]  # [num_tokens, vocab_size]
        logprobs = logits.log_softmax(-1)[num_context - 1 : -1]  # [num_continuation_tokens, vocab_size]
        wanted = torch.tensor(ids[num_context:])  # [num_continuation_tokens]
        total = logprobs.gather(1, wanted[:, None]).sum().item()
        results.append((total, bool((logprobs.argmax(-1) == wanted).all())))
    return results


if __name__ == "__main__":
    function = {f.__name__: f for f in (model_folder, tiny_model, generate, loglikelihoods)}[sys.argv[1]]
    print(json.dumps(function(**json.loads(sys.stdin.read()))))
