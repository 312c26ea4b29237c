"""Milestone M6 without weights: four prompts that begin alike, cached by hash and by trie.

Run: python milestones/m6/demo.py
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
SYSTEM = list(range(100, 110))
PROMPTS = {
    "first": SYSTEM,
    "the same": SYSTEM,
    "6 tokens alike": [*SYSTEM[:6], 1, 2, 3, 4],
    "one more": [*SYSTEM, 5],
}


def run(**engine_args: Any) -> tuple[list[int], list[list[int]], str]:
    """Per prompt, one after another: tokens found in the cache, and its block table; then what the counters say."""
    config = EngineConfig.from_args(preset="m6", block_size=4, max_model_len=16, num_kv_blocks=9, **engine_args)
    core = EngineCore(config.resolve(parse_hf_config(json.loads(SMOLLM2.read_text())), "cpu"), FakeExecutor())
    hits, tables = [], []
    for name, prompt in PROMPTS.items():
        request = Request(name, prompt, SamplingParams(max_tokens=3, ignore_eos=True))
        core.add_request(request)
        core.step()
        tables.append(core.scheduler.kv_cache_manager.get_block_ids(name)[0])
        while core.has_unfinished_requests():
            core.step()
        assert request.output_token_ids == fake_tokens(prompt, 3), "a wrong block gives wrong tokens"
        hits.append(request.num_cached_tokens)
    core.scheduler.check_integrity()
    stats = core.stats()
    return hits, tables, f"{stats.prefix_cache_hits} of {stats.prefix_cache_queries} tokens hit"


for switches in ({"enable_prefix_caching": False}, {}, {"prefix_index": "trie"}, {"partial_block_hits": True}):
    hits, tables, counters = run(**switches)
    print(f"{switches or 'on: the hash chain'}: {counters}")
    for name, hit, table in zip(PROMPTS, hits, tables, strict=True):
        print(
            f"    {name:15} {len(PROMPTS[name]):2} tokens, {hit:2} cached, {len(PROMPTS[name]) - hit:2} to compute,",
            end="",
        )
        print(f" blocks {table}")
assert run(enable_prefix_caching=False)[0] == [0, 0, 0, 0]
assert run()[:2] == run(prefix_index="trie")[:2] and run()[0] == [0, 8, 4, 8], "the same hits, in whole blocks"
assert run(partial_block_hits=True)[0] == [0, 9, 6, 10], "all but what has to be computed"
