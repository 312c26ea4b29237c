"""Milestone M3 without weights: the same memory in blocks of 64 tokens and in blocks of 4; then a pool of your own.

Run: python milestones/m3/demo.py
"""

import json
import random
from pathlib import Path
from typing import Any

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.hf_config import parse_hf_config
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams

HERE = Path(__file__).parent
SMOLLM2 = HERE.parents[1] / "tests/data/configs/SmolLM2-135M-Instruct.json"


def run(**engine_args: Any) -> tuple[int, int, float]:
    """24 requests through an engine: steps, most requests at once, mean share of the reserved slots in use."""
    config = EngineConfig.from_args(max_model_len=64, **engine_args)
    core = EngineCore(config.resolve(parse_hf_config(json.loads(SMOLLM2.read_text())), "cpu"), FakeExecutor())
    rng = random.Random(3)
    requests = []
    for i in range(24):
        prompt, out = rng.randint(4, 30), rng.randint(3, 25)
        params = SamplingParams(max_tokens=out, ignore_eos=True)
        requests.append(Request(f"r{i}", [rng.randrange(1000) for _ in range(prompt)], params))
        core.add_request(requests[-1])
    shares, most = [], 0
    while core.has_unfinished_requests():
        scheduled = core.scheduler.schedule()
        stats = core.stats()  # while the step runs
        shares.append(stats.num_used_slots / stats.num_reserved_slots)
        most = max(most, stats.num_running)
        core.scheduler.update_from_output(scheduled, core.executor.sample(core.executor.execute(scheduled)))
        core.scheduler.check_integrity()  # free + held = all, and no block belongs to two
    for request in requests:
        assert request.output_token_ids == fake_tokens(request.prompt_token_ids, request.max_tokens)
    assert core.stats().kv_cache_usage == 0.0, "every block came back"
    return len(shares), most, sum(shares) / len(shares)


shuffled = {"core.block_pool": f"{HERE / 'shuffled_block_pool.py'}:ShuffledBlockPool"}
arms: dict[str, dict[str, Any]] = {
    "m2: 6 blocks of 64": {"preset": "m2", "num_kv_blocks": 6 + 1},
    "m3: 96 blocks of 4": {"preset": "m3", "block_size": 4, "num_kv_blocks": 96 + 1},
    "m3, blocks at random": {"preset": "m3", "block_size": 4, "num_kv_blocks": 96 + 1, "parts": shuffled},
}
results = {name: run(**engine_args) for name, engine_args in arms.items()}
for name, (steps, most, share) in results.items():
    print(f"{name:22} {steps:3} steps, at most {most:2} requests at once, {share:.1%} of the reserved slots used")
m2, m3, at_random = results.values()
assert m3 == at_random, "which block it is changes nothing"
assert m3[1] >= 2 * m2[1] and m3[2] > 0.9 > 2 * m2[2]
