"""The real model behind AsyncLLM: the answers of `LLM`, from a front end that never imports torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from folovllm import LLM, SamplingParams

pytestmark = [pytest.mark.m8, pytest.mark.weights]
ROOT = Path(__file__).parents[2]
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time", "1, 2, 3,"]
ENGINE_ARGS = {"model": "smollm2-135m", "dtype": "float32", "max_model_len": 256, "num_kv_blocks": 100}
SCRIPT = f"""
import asyncio, json, sys
from folovllm import RequestOutputKind, SamplingParams, start_async_llm

async def answer(engine, i, prompt):
    params = SamplingParams(temperature=0.0, max_tokens=24, output_kind=RequestOutputKind.DELTA)
    return [t async for output in engine.generate(prompt, params, f"r{{i}}") for t in output.outputs[0].token_ids]

async def main():
    async with await start_async_llm(**{ENGINE_ARGS!r}) as engine:
        answers = await asyncio.gather(*(answer(engine, i, prompt) for i, prompt in enumerate({PROMPTS!r})))
        assert engine.stats.kv_cache_usage == 0.0 and engine.config.device == "cpu" and engine.description
        print(json.dumps(answers), "torch" in sys.modules)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_the_engine_process_answers_as_llm_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers, has_torch = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert has_torch == "False"
    llm = LLM(**ENGINE_ARGS)
    expected = llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)
    assert json.loads(answers) == [output.outputs[0].token_ids for output in expected]
