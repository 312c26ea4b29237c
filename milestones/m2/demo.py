"""Milestone M2 without weights: the same requests one at a time, static and continuous; then a preemption.

Run: python milestones/m2/demo.py
"""

import json
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.hf_config import parse_hf_config
from folovllm.learn.three_requests import example_core, run_example
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

SMOLLM2 = Path(__file__).parents[2] / "tests/data/configs/SmolLM2-135M-Instruct.json"


def run(lengths: dict[str, tuple[int, int]], **engine_args: Any) -> list[dict[str, int]]:
    """How many tokens each request computes in each step. The sampled tokens are checked on the way."""
    config = EngineConfig.from_args(**engine_args).resolve(parse_hf_config(json.loads(SMOLLM2.read_text())), "cpu")
    core = EngineCore(config, FakeExecutor())
    requests = [
        Request(name, [7 * i + ord(name) for i in range(prompt)], SamplingParams(max_tokens=out, ignore_eos=True))
        for name, (prompt, out) in lengths.items()
    ]
    for request in requests:
        core.add_request(request)
    steps = []
    while core.has_unfinished_requests():
        scheduled = core.scheduler.schedule()
        core.scheduler.update_from_output(scheduled, core.executor.sample(core.executor.execute(scheduled)))
        core.scheduler.check_integrity()
        steps.append(scheduled.num_scheduled_tokens)
    for request in requests:
        assert request.output_token_ids == fake_tokens(request.prompt_token_ids, request.max_tokens)
    return steps


four = {"A": (5, 8), "B": (4, 2), "C": (6, 3), "D": (3, 3)}
arms: dict[str, dict[str, Any]] = {
    "one at a time": {"preset": "m1"},
    "static, 2 seats": {"preset": "m2", "without": ["m2"], "max_num_seqs": 2},
    "continuous, 2 seats": {"preset": "m2", "max_num_seqs": 2},
}
num_steps = []
for title, switches in arms.items():
    steps = run(four, max_model_len=32, **switches)
    print(f"{title}: {len(steps)} steps")
    for name in four:
        print(f"  {name} {' '.join(str(step.get(name, '.')) for step in steps)}")
    num_steps.append(len(steps))
assert num_steps == [16, 11, 8]

print("preemption: six blocks of 4 tokens for the three requests of docs/learn/02 and 03")
run_steps = list(run_example(example_core(block_size=4, num_kv_blocks=7)))
print(*run_steps, sep="\n")
assert run_steps[5].preempted == ["c"] and run_steps[6].scheduled == {"c": 13}, "12 prompt tokens again, and one more"
