#!/usr/bin/env python3
"""Example: complete half of a data set with two engines, then all of it: what is done is skipped.

Milestone: M10. It runs on 2 cores, although Ray counts 3 CPUs for it, and needs `pip install 'folovllm[ray]'`:

    python scripts/ray/complete_dataset.py --model smollm2-135m
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from folovllm.data import Report, complete

QUESTIONS = (
    "The capital of France is",
    "The opposite of hot is",
    "Once upon a time",
    "2 + 2 =",
    "My favourite food is",
)


def write_prompts(path: Path, count: int) -> None:
    """`count` prompts, and two lines that are none."""
    rows = [{"id": i, "prompt": f"{i}. {QUESTIONS[i % len(QUESTIONS)]}"} for i in range(count)]
    lines = [json.dumps(row) for row in rows] + ["{not JSON", json.dumps({"prompt": "I have no id"})]
    path.write_text("\n".join(lines) + "\n")


def run(path: Path, output: Path, model: str) -> Report:
    report = complete(
        path,
        output=output,
        model=model,
        sampling_params={"max_tokens": 12, "temperature": 0.0},
        concurrency=2,
        batch_size=8,
        cpu_threads=1,
        max_model_len=256,
    )
    print(
        f"{report.num_completed} completed, {report.num_skipped} were there before, {report.num_rejected} rejected, "
        f"{report.num_failed} with an error"
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="an alias, a folder or an id (default: smollm2-135m)")
    parser.add_argument("--num-prompts", type=int, default=48, help="how many prompts to make (default: 48)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "prompts.jsonl"), Path(folder, "answers")
        write_prompts(path, args.num_prompts // 2)
        run(path, output, args.model)
        write_prompts(path, args.num_prompts)  # as if the first run had been stopped half-way
        report = run(path, output, args.model)
        for row in report.results().to_pylist()[:5]:
            print(f"{row['id']:4d}  {row['text']!r}")
        for row in report.rejected():
            print(f"rejected: {row['error']}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:  # names what a user can mend, such as a missing package
        sys.exit(f"error: {error}")
