"""Milestone M5 without weights: a long prompt arrives among four decodes; the prompt whole, then in chunks.

Run: python milestones/m5/demo.py
"""

import json
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.hf_config import parse_hf_config
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

SMOLLM2 = Path(__file__).parents[2] / "tests/data/configs/SmolLM2-135M-Instruct.json"
NAMES = ["a", "b", "c", "d", "long"]


def run(**engine_args: Any) -> tuple[list[dict[str, int]], dict[str, list[int]]]:
    """What each step computes, and in which steps each request got a token. The long prompt arrives after 3 steps."""
    config = EngineConfig.from_args(preset="m5", max_model_len=256, num_kv_blocks=64, **engine_args)
    core = EngineCore(config.resolve(parse_hf_config(json.loads(SMOLLM2.read_text())), "cpu"), FakeExecutor())
    greedy = {name: SamplingParams(max_tokens=4 if name == "long" else 24, ignore_eos=True) for name in NAMES}
    requests = {
        name: Request(name, [7 * i % 1000 for i in range(200 if name == "long" else 3)], greedy[name]) for name in NAMES
    }
    steps: list[dict[str, int]] = []
    tokens: dict[str, list[int]] = {name: [] for name in NAMES}
    for name in NAMES[:4]:
        core.add_request(requests[name])
    while core.has_unfinished_requests():
        if len(steps) == 3:
            core.add_request(requests["long"])
        scheduled = core.scheduler.schedule()
        sampled = core.executor.sample(core.executor.execute(scheduled))
        for output in core.scheduler.update_from_output(scheduled, sampled):
            tokens[output.request_id].append(len(steps))
        steps.append(dict(scheduled.num_scheduled_tokens))
    for request in requests.values():  # a wrong chunk would give wrong tokens
        assert request.output_token_ids == fake_tokens(request.prompt_token_ids, request.max_tokens)
    return steps, tokens


whole, whole_tokens = run(enable_chunked_prefill=False)
chunked, chunked_tokens = run(max_num_batched_tokens=32)
for name, steps, tokens in (("whole prompt", whole, whole_tokens), ("budget 32", chunked, chunked_tokens)):
    print(f"{name:13} {len(steps):2} steps of at most {max(sum(s.values()) for s in steps):3} tokens;", end=" ")
    print("the long prompt's parts:", [step["long"] for step in steps if step.get("long", 0) > 1])
    assert all(tokens[n] == list(range(24)) for n in "abcd"), "every decode gets a token in every step"
assert max(sum(step.values()) for step in chunked) == 32 < max(sum(step.values()) for step in whole) == 204
assert chunked_tokens["long"][0] == 3 + -(-200 // 28) - 1, "its first token comes with its last chunk"
assert sum(map(sum, (s.values() for s in whole))) == sum(map(sum, (s.values() for s in chunked))), "the same work"
