"""The capstone, m7/your_engine: whole engines made of a learner's parts, good ones and one with a fault.

Milestone: M7 (R7.30). Each exercise is tested with its own files by the guards; here is what the capstone adds.
"""

from pathlib import Path
from typing import Any

import pytest

from folovllm.learn.check import Mine
from folovllm.learn.exercise import milestones_dir
from folovllm.parts import PARTS, load_file

pytestmark = pytest.mark.m7

CHECKS: Any = load_file(milestones_dir() / "m7/exercises/your_engine/checks.py")
# Of the scheduler, the memory manager, the prefix index, the sampler and the quantiser.
GOOD = (
    "core.scheduler", "core.block_pool", "core.kv_cache_manager", "core.prefix_index.hash", "core.prefix_index.trie",
    "core.request_queue.priority", "sample.sampler", "quantize.grid", "quantize.packing", "quantize.gptq",
)  # fmt: skip


def write_parts(folder: Path, faults: dict[str, str] | None = None) -> Mine:
    """A file per part with a subclass of the engine's class; `faults` are lines of the class bodies."""
    parts = {}
    for name in GOOD:
        module, _, cls = PARTS[name].default.partition(":")
        file = folder / f"{name.replace('.', '_')}.py"
        body = (faults or {}).get(name, "    pass")
        file.write_text(f"from {module} import {cls} as Base\n\n\nclass Part(Base):\n{body}\n", encoding="utf-8")
        parts[name] = f"{file}:Part"
    return Mine(None, parts, None)


def test_good_parts_pass(tmp_path: Path) -> None:
    mine = write_parts(tmp_path)
    CHECKS.the_same_decisions(mine)
    CHECKS.the_same_tokens_on_a_lattice(mine)
    CHECKS.a_model_of_your_own(mine)


LAST_IN_FIRST_OUT = """    def peek_request(self):
        return list(self)[-1]

    def pop_request(self):
        request = self.peek_request()
        self.remove_requests([request])
        return request"""
GREEDY_TAKES_THE_WORST = """    def __call__(self, logits, metadata):
        return super().__call__(-logits, metadata)"""


def test_a_fault_is_found_and_named(tmp_path: Path) -> None:
    """A queue that serves the last first decides otherwise; a sampler of the worst token says something else."""
    with pytest.raises(AssertionError, match=r"The first difference is at step"):
        CHECKS.the_same_decisions(write_parts(tmp_path, {"core.request_queue.priority": LAST_IN_FIRST_OUT}))
    with pytest.raises(AssertionError, match=r"your engine generated \[.*\], and ours \["):
        CHECKS.the_same_tokens_on_a_lattice(write_parts(tmp_path, {"sample.sampler": GREEDY_TAKES_THE_WORST}))


@pytest.mark.slow  # a test run inside a test; .ci/run has it
def test_the_engines_own_tests_run_on_the_parts(tmp_path: Path) -> None:
    """With good parts they pass; with a fault, the message names the test that fails."""
    files = ("tests/m2/test_core_queues.py",)
    CHECKS.run_tests(write_parts(tmp_path), files)
    with pytest.raises(AssertionError, match=r"fails a test of its own: FAILED tests/m2/test_core_queues\.py::\w+"):
        CHECKS.run_tests(write_parts(tmp_path, {"core.request_queue.priority": LAST_IN_FIRST_OUT}), files)


BLIND = """    def mask_future(self, scores, first_key, position, num_rows):
        pass"""


@pytest.mark.slow  # a test run inside a test; .ci/run has it
def test_tests_of_a_backend_run_on_the_learners_class(tmp_path: Path) -> None:
    """Those tests name their backend, so the class must take the place of the one that it inherits from."""
    home = "folovllm.attention.backends.torch_flash"
    for body, passes in (("    pass", True), (BLIND, False)):
        file = tmp_path / f"attention_{passes}.py"
        file.write_text(f"from {home} import TorchFlashBackend\n\n\nclass Part(TorchFlashBackend):\n{body}\n")
        mine = Mine(None, {"attention.backend": f"{file}:Part"}, None)
        arguments = ("tests/m4/test_backends.py", "-k", "torch_flash and (one_token or block_boundaries)")
        if passes:
            CHECKS.run_tests(mine, arguments)
        else:
            with pytest.raises(AssertionError, match=r"fails a test of its own: FAILED tests/m4/test_backends\.py"):
                CHECKS.run_tests(mine, arguments)
