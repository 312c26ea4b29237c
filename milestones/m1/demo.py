"""Milestone M1 without weights: one request after another through the real engine core, and the sampler by hand.

Run: python milestones/m1/demo.py
"""

import torch

from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.hf_config import parse_hf_config
from folovllm.request import Request
from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.sampler import Sampler
from folovllm.sampling_params import SamplingParams

# 1. The engine. The fake model's "K/V" is a digest read back through the block table: a wrong table, a wrong token.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip
config = EngineConfig.preset("m1", max_model_len=64).resolve(parse_hf_config(SMOLLM2), "cpu")
core = EngineCore(config, FakeExecutor())
prompts = {"x": [5, 6, 7, 8, 9], "y": [1, 2, 3]}
for request_id, prompt in prompts.items():
    core.add_request(Request(request_id, prompt, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)))

tokens: dict[str, list[int]] = {request_id: [] for request_id in prompts}
steps = []
while core.has_unfinished_requests():
    scheduled = core.scheduler.schedule()
    result = core.executor.sample(core.executor.execute(scheduled))
    for output in core.scheduler.update_from_output(scheduled, result):
        tokens[output.request_id] += output.new_token_ids
    print(f"step {len(steps)}: computes {scheduled.num_scheduled_tokens}, samples {result.sampled_token_ids}")
    steps.append(scheduled.num_scheduled_tokens)
assert steps == [{"x": 5}, {"x": 1}, {"x": 1}, {"y": 3}, {"y": 1}, {"y": 1}], "a prompt, then its decodes; then y"
assert tokens == {request_id: fake_tokens(prompt, 3) for request_id, prompt in prompts.items()}
core.scheduler.check_integrity()
assert core.stats().kv_cache_usage == 0.0

# 2. The sampler, on five tokens. docs/learn/01_basic_inference.md works it out with pencil and paper.
logits = torch.tensor([[2.0, 1.0, 3.0, 0.5, -1.0]])
params = SamplingParams(
    logit_bias={3: 1.25}, repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.25, temperature=0.5,
    min_p=0.01, top_k=3, top_p=0.9, seed=42, logprobs=5,
)  # fmt: skip
row = SamplingRow(params, [4], [2, 2, 1], eos_token_id=0, seed=42, bad_words_token_ids=[])
answer = Sampler("processed_logits")(logits, SamplingMetadata.build([row], 5, "cpu"))
(left,) = answer.logprobs
assert left is not None
by_id = dict(zip(left.token_ids, left.logprobs, strict=True))
print("sampler: logits", logits[0].tolist(), "->", [by_id[i] for i in range(5)], "-> token", answer.sampled_token_ids)
assert [i for i in by_id if by_id[i] > float("-inf")] == [3, 0] and answer.sampled_token_ids == [3]
