"""Random workloads of the exercises: they preempt and abort, and the rule that a scheduler breaks is named (R2.44)."""

from typing import Any

import pytest

from folovllm.learn.defaults import lint_workload
from folovllm.learn.exercise import milestones_dir
from folovllm.learn.toy_engine import add_all, drive, make_core, make_request, random_workload, run_workload

pytestmark = pytest.mark.m2

TIGHT: dict[str, Any] = {"block_size": 2, "num_kv_blocks": 10, "max_num_seqs": 5}


def test_the_workloads_preempt_and_abort() -> None:
    workloads = [random_workload(seed, "m3", with_aborts=True, **TIGHT) for seed in range(24)]
    cut_short = preemptions = 0
    for workload in workloads:
        outputs = run_workload(workload)
        asked = {args["request_id"]: args["max_tokens"] for _, args in workload.arrivals}
        cut_short += sum(len(outputs.get(request_id, [])) < asked[request_id] for _, request_id in workload.aborts)
        core = make_core(**workload.config_args)
        add_all(core, [make_request(**args) for _, args in workload.arrivals])
        drive(core)
        preemptions += core.stats().num_preemptions
    assert cut_short >= 20 and preemptions >= 20, (cut_short, preemptions)


def test_without_aborts_the_workload_is_the_same_otherwise() -> None:
    for seed in range(10):
        aborted, plain = random_workload(seed, "m6", with_aborts=True), random_workload(seed, "m6")
        assert (aborted.config_args, aborted.arrivals, plain.aborts) == (plain.config_args, plain.arrivals, ())


def test_a_broken_rule_is_named() -> None:
    """The mutant runs new prompts before the running requests, as nano-vllm does."""
    mutant = milestones_dir() / "m2/exercises/scheduler_fcfs/mutants/prefill_first.py"
    with pytest.raises(AssertionError, match="the rule: running requests come first"):
        for seed in range(20):
            lint_workload(random_workload(seed, "m5"), {"core.scheduler": f"{mutant}:Scheduler"})
