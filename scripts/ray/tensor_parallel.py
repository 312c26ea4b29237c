#!/usr/bin/env python3
"""Example: one model on several ranks, each of them a Ray actor. `pip install 'folovllm[ray]'`

Milestone: M10. The default model has 9 query heads and 3 KV heads, so it can be divided among 3 ranks:
python scripts/ray/tensor_parallel.py --ranks 3
"""

import argparse
import sys

from folovllm import LLM, SamplingParams

PROMPTS = ["The capital of France is", "The opposite of hot is", "Once upon a time"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="an alias, a folder or an id (default: smollm2-135m)")
    parser.add_argument("--ranks", type=int, default=3, help="1 or 3 for smollm2-135m, which has 9 heads (default: 3)")
    args = parser.parse_args()
    greedy = SamplingParams(temperature=0.0, max_tokens=16)
    options = {"dtype": "float32", "max_model_len": 256}
    ranks = LLM(
        args.model,
        tensor_parallel_size=args.ranks,
        distributed_executor_backend="ray",
        cpu_threads=1,
        **options,
    )
    divided = ranks.generate(PROMPTS, greedy, use_tqdm=False)
    ranks.shutdown()
    alone = LLM(args.model, **options).generate(PROMPTS, greedy, use_tqdm=False)
    for one, several in zip(alone, divided, strict=True):
        same = one.outputs[0].token_ids == several.outputs[0].token_ids
        print(f"{several.prompt!r} -> {several.outputs[0].text!r}  {'as one process' if same else 'DIFFERS'}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # names what a user can mend, such as a missing package
        sys.exit(f"error: {error}")
