"""What HuggingFace says: greedy tokens of the default model in fp32, kept as tests/data/hf_greedy.json.

Milestone: M1. vLLM counterpart: the HfRunner of its tests, which runs HuggingFace anew in every test. 20 prompts of 128
tokens take it minutes, so its answers are kept in the repository, with the versions and the hash of the weights that
they belong to; a few are asked again live in the tests (tests/m1/test_parity_real.py).

Beside the tokens stands how close each decision was: the gap of the two largest logits at every step. EOS does not stop
the text, so that every prompt gives `--tokens` tokens.

    python scripts/dev/make_hf_fixture.py [--out tests/data/hf_greedy.json] [--tokens 128]
"""

import argparse
import hashlib
import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from folovllm.config import DEFAULT_MODEL
from folovllm.engine.tokenizer import Tokenizer
from folovllm.hub import find_model

OUT = Path(__file__).parents[2] / "tests" / "data" / "hf_greedy.json"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")

STORY = (
    "The lighthouse stood at the end of a long stone pier, and in winter the sea broke over it from both sides. "
    "Every evening at dusk old Martin walked out with a can of oil in each hand, counting his steps so that he "
    "would know, in fog, when to turn left. There were four hundred and twelve. He had a dog called Button who was "
    "afraid of the water and waited at the landward end, barking once every minute or so to tell him where home "
    "was. "
)
REPORT = (
    "Quarterly report. Revenue rose from 14.2 million to 17.9 million, mostly because the northern branch opened "
    "two new stores in March. Costs rose as well: rent by 6 percent, wages by 4 percent, freight by 19 percent "
    "after the port was closed for repairs. The board discussed three proposals. The first was to move the "
    "warehouse inland, the second to buy a share in the freight company, and the third to do nothing for a year and"
    " wait for prices to fall. "
)

# Name -> text, or the messages of a chat.
PROMPTS: dict[str, str | list[dict[str, str]]] = {
    "capital": "The capital of France is",
    "one letter": "A",
    "one word": "Hello",
    "digits": "1, 2, 3, 4, 5, 6,",
    "arithmetic": "12 + 30 = 42\n25 + 17 = 42\n19 + 44 = 63\n38 + 27 =",
    "science": "Photosynthesis is the process by which plants",
    "history": "In the year 1492, Christopher Columbus set sail from Spain with three ships named",
    "python": 'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number."""\n',
    "json": '{"name": "Ada Lovelace", "born": 1815, "occupation": "',
    "sql": "SELECT customers.name, SUM(orders.amount) FROM customers JOIN orders ON",
    "c": "#include <stdio.h>\n\nint main(void) {\n    int numbers[10];\n    for (int i = 0;",
    "chinese": "中国的首都是北京，它是一座",
    "chinese poem": "床前明月光，疑是地上霜。",
    "french": "Il était une fois une petite fille qui",
    "emoji": "Weather today: ☀️ 25°C. Weather tomorrow:",
    "list": "Shopping list:\n- milk\n- eggs\n- bread\n-",
    "chat": [{"role": "user", "content": "What is gravity? Answer in one sentence."}],
    "chat turns": [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Ahoy, matey!"},
        {"role": "user", "content": "Tell me a joke about the sea."},
    ],
    "long story": STORY * 2 + STORY[: len(STORY) // 2].strip() + " One night the oil ran out, and",
    "long report": REPORT * 2 + "Summary in two sentences:",
}


def encode(tokenizer: Tokenizer, prompt: str | list[dict[str, str]]) -> list[int]:
    """Token ids as `LLM.generate` (text) and `LLM.chat` (messages) make them."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


@torch.inference_mode()
def greedy(model: Any, prompt_token_ids: list[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """HuggingFace's greedy tokens after a prompt, and the gap of the top two logits at each of them."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, max_new_tokens=num_tokens, eos_token_id=None, pad_token_id=0)
    inputs = torch.tensor([prompt_token_ids])  # [1, num_prompt_tokens]
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        generation_config=config,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top_two = torch.cat(output.logits).topk(2).values  # [num_tokens, 2]
    return output.sequences[0, len(prompt_token_ids) :].tolist(), (top_two[:, 0] - top_two[:, 1]).tolist()


def weights_sha256(folder: Path) -> str:
    with open(folder / "model.safetensors", "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def header(folder: Path, num_tokens: int) -> dict[str, Any]:
    return {
        "made_by": "scripts/dev/make_hf_fixture.py",
        "model": DEFAULT_MODEL,
        "weights_sha256": weights_sha256(folder),
        "dtype": "float32",
        "num_tokens": num_tokens,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per prompt")
    args = parser.parse_args()

    from folovllm.entrypoints.commands.hf_baseline import load_hf

    torch.set_num_threads(1)
    folder = find_model(DEFAULT_MODEL, pull=True)
    tokenizer, model = Tokenizer.from_folder(folder), load_hf(folder, "float32")
    rows = []
    for name, prompt in PROMPTS.items():
        start = time.perf_counter()
        prompt_token_ids = encode(tokenizer, prompt)
        token_ids, gaps = greedy(model, prompt_token_ids, args.tokens)
        rows.append(
            {
                "name": name,
                "prompt_token_ids": prompt_token_ids,
                "token_ids": token_ids,
                "min_gap": round(min(gaps), 6),
                "min_gap_at": gaps.index(min(gaps)),
                "near_ties": {str(i): round(gap, 6) for i, gap in enumerate(gaps) if gap < 1e-2},
            }
        )
        seconds = time.perf_counter() - start
        print(f"{name:14} {len(prompt_token_ids):4} tokens, smallest gap {min(gaps):.5f}, {seconds:.1f} s", flush=True)
    args.out.write_text(dumps(header(folder, args.tokens), rows))
    print(f"wrote {args.out}")


def dumps(head: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """JSON with one prompt per line: readable in a diff."""
    lines = [json.dumps(head, indent=1)[:-2] + ',\n "prompts": [']
    lines.append(",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows))
    return "\n".join([*lines, " ]", "}", ""])


if __name__ == "__main__":
    main()
