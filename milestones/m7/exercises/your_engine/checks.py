"""Checks of m7/your_engine: everything that the learner has written, in one engine."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from folovllm.gptq_config import GPTQConfig
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import PROMPTS, check_workload, tiny_model
from folovllm.learn.exercise import PACKAGE
from folovllm.learn.toy_engine import random_workload
from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint

CLONE = PACKAGE.parent
NUM_WORKLOADS = 12
TEST_SECONDS = 900.0  # for a set of tests on a slow or busy machine; alone each takes less than a minute
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"scheduling_policy": "priority"},
    {"prefix_index": "trie"},
    {"block_size": 2, "num_kv_blocks": 24},
)
COMPUTE = ("attention.backend", "sample.sampler", "worker.block_table", "quantize.packing", "engine.text_stream")
# What exercises the parts: the rest of the suite is about files, commands and pages.
CORE_TESTS = (
    "tests/m1/test_core_engine.py", "tests/m1/test_core_kv_cache_manager.py", "tests/m1/test_core_request.py",
    "tests/m2/test_core_abort.py", "tests/m2/test_core_queues.py", "tests/m2/test_core_scheduler.py",
    "tests/m3/test_core_paging.py", "tests/m3/test_core_public_bugs.py",
    "tests/m5/test_chunk_scheduling.py", "tests/m5/test_chunk_public_bugs.py",
    "tests/m6/test_hits.py", "tests/m6/test_public_bugs.py",
)  # fmt: skip
MODEL_TESTS = ("tests/m5/test_chunk_tokens.py", "tests/m6/test_llm_cache.py", "tests/m7/test_checkpoint.py")
ATTENTION_TESTS = ("tests/m4/test_backends.py", "-k", "torch_flash")
LATTICE_TESTS = ("tests/m3/test_lattice.py",)


def prediction() -> str:
    from folovllm.parts import PARTS

    computing = [name for name in COMPUTE if name in PARTS]
    others = [name for name in PARTS if name.startswith("core.")]
    return (
        f"{', '.join(computing)} compute what is said, so they can change a token. {', '.join(others)} decide who "
        "is computed when and where: in a correct engine they change only when a token comes, and a token that changes "
        "with them was computed from the wrong slots"
    )


@check("trace", spec="R7.30", hint=3)
def the_same_decisions(mine: Mine) -> None:
    """On random workloads every step decides what it decides with the engine's own parts."""
    for settings in SETTINGS:
        for seed in range(NUM_WORKLOADS):
            check_workload(random_workload(seed, "m6", **settings), mine.parts)


@check("engine", spec="R7.30", hint=3)
def the_same_tokens_on_a_lattice(mine: Mine) -> None:
    """A real engine made of all parts generates the tokens that it generates with its own, however it is set."""
    for args in lattice():
        wanted, found = tokens(tiny_model(), {}, **args), tokens(tiny_model(), mine.parts, **args)
        for prompt, a, b in zip(PROMPTS, wanted, found, strict=True):
            assert a == b, f"with {args} and the prompt {prompt} your engine generated {b}, and ours {a}"


def lattice() -> Iterator[dict[str, Any]]:
    for preset, block_size, budget in product(("m3", "m6"), (1, 4, 16), (7, 64)):
        sizes = {"block_size": block_size, "num_kv_blocks": 160 // block_size}
        yield {"preset": preset} | sizes | ({"max_num_batched_tokens": budget} if preset == "m6" else {})
    for preset in ("m1", "m2", "m5", "m7"):
        yield {"preset": preset}
    yield {"preset": "m6", "prefix_index": "trie", "scheduling_policy": "priority"}


def tokens(model: str, parts: Mapping[str, str], preset: str = "m7", **args: Any) -> list[list[int]]:
    from folovllm.entrypoints.llm import LLM
    from folovllm.sampling_params import SamplingParams

    without = ["m4"] if preset >= "m4" else []  # its fast kernels change no token, and may have to be built first
    llm = LLM(model, preset=preset, without=without, dtype="float32", device="cpu", max_model_len=64, max_num_seqs=4,
              skip_tokenizer_init=True, parts=dict(parts), **args)  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


@check("engine", spec="R7.30", hint=3)
def a_model_of_your_own(mine: Mine) -> None:
    """Your quantiser writes a 4-bit checkpoint. Your engine and ours generate the same tokens from it."""
    windows = [[(7 * i + 11 * j * j) % 500 for i in range(1, 33)] for j in range(8)]
    with tempfile.TemporaryDirectory(prefix="folovllm-learn-") as folder:
        out = Path(folder, "quantised")
        settings = QuantizeSettings(GPTQConfig(4, 32), parts=dict(mine.parts))
        quantize_checkpoint(Path(tiny_model()), out, settings, windows, progress=False)
        args = {"gptq_kernel": "dequant"}
        wanted, found = tokens(str(out), {}, **args), tokens(str(out), mine.parts, **args)
        assert found == wanted, f"from your own 4-bit checkpoint your engine generated {found}, and ours {wanted}"


@check("engine", spec="R7.30", hint=2, seconds=TEST_SECONDS)
def the_tests_of_the_core(mine: Mine) -> None:
    """In a clone: the tests of scheduling, memory and prefix caching pass with your parts."""
    run_tests(mine, CORE_TESTS)


@check("engine", spec="R7.30", hint=2, seconds=TEST_SECONDS)
def the_tests_of_the_model(mine: Mine) -> None:
    """In a clone: the tests that run models, chunks, cached prefixes and quantised checkpoints pass with your parts."""
    run_tests(mine, MODEL_TESTS)


@check("engine", spec="R7.30", hint=2, seconds=TEST_SECONDS)
def the_tests_of_attention(mine: Mine) -> None:
    """In a clone: your attention is as near to the formula in fp64 as every backend must be."""
    run_tests(mine, ATTENTION_TESTS)


@check("engine", spec="R7.30", hint=2, seconds=TEST_SECONDS)
def the_lattice_of_the_project(mine: Mine) -> None:
    """In a clone: every pair of features together gives the tokens of plain generation, with your parts."""
    run_tests(mine, LATTICE_TESTS)


def run_tests(mine: Mine, arguments: tuple[str, ...]) -> None:
    """Runs the engine's own tests on the learner's parts. An installed package has no tests: nothing is run there."""
    if not mine.parts or not (CLONE / "tests").is_dir():
        return
    parts = [text for name, spec in mine.parts.items() for text in ("--part", f"{name}={spec}")]
    marks = " or ".join(f"m{i}" for i in range(1, 8))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "auto", "-p", "no:cacheprovider",
               "-m", f"({marks}) and not weights and not slow", *parts, *arguments]  # fmt: skip
    done = subprocess.run(command, cwd=CLONE, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
    summary = failed or (done.stdout + done.stderr).splitlines()[-3:]
    assert done.returncode == 0, (
        f"with your parts the engine fails a test of its own: {' '.join(summary)}. Run it alone with "
        "`pytest TEST --mine` in the clone"
    )
