"""Measured times that the learning pages quote, read from the committed result files.

Milestone: M2. vLLM counterpart: none.
"""

import json

from folovllm.learn.exercise import milestones_dir

STEP_ARMS = {"plain torch": "1 plain torch", "fast kernels": "7 + huge pages"}  # M1 to M3, and M4


def step_parts(arm: str, num_requests: int) -> dict[str, float]:
    """Returns the milliseconds of a step in which `num_requests` requests decode one token each: step, linears,
    attention, rest.

    `arm` is "plain torch" or "fast kernels". Each request has 200 tokens in the cache, and the model is SmolLM2-135M in
    bf16. E.g. step_parts("plain torch", 1)["step"] is 30.5.
    """
    profile = json.loads((milestones_dir() / "m4/results/profile_step.json").read_text(encoding="utf-8"))
    (row,) = (r for r in profile["results"] if (r["arm"], r["requests"]) == (STEP_ARMS[arm], num_requests))
    parts = {"step": row["step"], "linears": row["linear"], "attention": row["attention"]}
    parts["rest"] = 2 * parts["step"] - sum(parts.values())
    return {name: microseconds / 1000 for name, microseconds in parts.items()}
