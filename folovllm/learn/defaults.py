"""The checks that every exercise gets: traces on the toy engine, and the tokens of a real one.

Milestone: M1. vLLM counterpart: none. An exercise whose checks.py has checks of such a level brings its own instead.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from folovllm.config import CacheConfig, SchedulerConfig
from folovllm.learn.check import Check, Mine
from folovllm.learn.exercise import Exercise
from folovllm.learn.toy_engine import Workload, random_workload, run_workload
from folovllm.milestones import rung_number
from folovllm.trace.diff import diff
from folovllm.trace.lint import RULES, lint
from folovllm.trace.record import read_trace

NUM_WORKLOADS = 20
NAMES = ("the reference", "yours")
PROMPTS = ([11, 7, 23, 5], [3] * 9, list(range(40, 60)), [11, 7, 23, 5, 99])  # two share a beginning
MAX_TOKENS = 12


def default_checks(exercise: Exercise) -> list[Check]:
    """The default check of each level that the exercise has one for."""

    def same_trace_as_the_reference(mine: Mine) -> None:
        """On random workloads, every step decides what it decides with the engine's own part."""
        for seed in range(NUM_WORKLOADS):
            workload = random_workload(seed, exercise.milestone, **toy_args(exercise.engine))
            check_workload(workload, mine.parts, reference_parts(exercise))

    def same_tokens_from_a_real_model(mine: Mine) -> None:
        """A real engine (a tiny model of random weights) generates the tokens that it generates with its own part."""
        check_tokens(exercise, mine.parts)

    spec = exercise.spec[0]
    engine = [Check("engine", same_tokens_from_a_real_model, spec, hint=3)] if exercise.replaces_a_part else []
    return ([Check("trace", same_trace_as_the_reference, spec, hint=2)] if exercise.compares_traces else []) + engine


def reference_parts(exercise: Exercise) -> dict[str, str]:
    """What the learner's part is compared with, as the engine argument `parts`."""
    return {exercise.part: exercise.reference} if exercise.reference else {}


def toy_args(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """Those engine arguments that the toy engine has: of the cache and of the scheduler."""
    known = {*CacheConfig.__dataclass_fields__, *SchedulerConfig.__dataclass_fields__, "max_model_len"}
    return {name: value for name, value in engine_args.items() if name in known}


def check_workload(workload: Workload, parts: Mapping[str, str], reference: Mapping[str, str] | None = None) -> None:
    """Runs a workload twice. Raises AssertionError with the first step in which the two engines decide differently."""
    with tempfile.TemporaryDirectory(prefix="folovllm-learn-") as folder:
        theirs, mine = Path(folder, "reference.jsonl"), Path(folder, "mine.jsonl")
        run_workload(workload, reference, theirs)
        try:
            run_workload(workload, parts, mine)
        except Exception as error:
            if not isinstance(error, NotImplementedError):
                error.add_note("\n".join([*_explain(theirs, mine), f"The workload: {workload}."]))
            raise
        difference = _explain(theirs, mine)
        assert not difference, "\n".join([*difference, f"The workload: {workload}."])


def lint_workload(workload: Workload, parts: Mapping[str, str]) -> None:
    """Runs a workload. Raises AssertionError with the first rule of trace/lint.py that it breaks."""
    with tempfile.TemporaryDirectory(prefix="folovllm-learn-") as folder:
        path = Path(folder, "mine.jsonl")
        try:
            run_workload(workload, parts, path)
        except Exception as error:
            error.add_note(f"The workload: {workload}.")
            raise
        violations = lint(path)
    assert not violations, f"{violations[0]} (the rule: {RULES[violations[0].rule]})\nThe workload: {workload}."


def _explain(reference_file: Path, my_file: Path) -> list[str]:
    """The first difference between two traces in sentences; an empty list if there is none."""
    theirs, mine = read_trace(reference_file), read_trace(my_file)
    mine.config["parts"] = theirs.config["parts"]  # that they differ is the point
    found = diff(theirs, mine, NAMES)
    if found is None:
        return []
    sides = [f"In {name}: {', '.join(phrases)}."
             for name, phrases in zip(NAMES, (found.a_only, found.b_only), strict=True) if phrases]  # fmt: skip
    return [f"The first difference is at step {found.step}: {found.sentence}.", *sides]


# ---- the real engine


def check_tokens(exercise: Exercise, parts: Mapping[str, str]) -> None:
    """Raises AssertionError unless a real engine generates the same tokens with `parts` and with the reference."""
    of_reference, of_mine = real_tokens(exercise, reference_parts(exercise)), real_tokens(exercise, parts)
    for prompt, a, b in zip(PROMPTS, of_reference, of_mine, strict=True):
        assert a == b, (
            f"after the prompt {prompt} the engine generated {b} with your part, and {a} with its own: your part "
            "changes what the model computes"
        )


@contextlib.contextmanager
def with_attributes(parts: Mapping[str, str], **attributes: Any) -> Iterator[dict[str, str]]:
    """`parts` whose classes have other class attributes, for engines that would never reach a case otherwise.

    E.g. with BLOCK_KV=8 the attention of a short prompt has several tiles.
    """
    with tempfile.TemporaryDirectory(prefix="folovllm-learn-") as folder:
        changed = {}
        for number, (name, spec) in enumerate(parts.items()):
            file = Path(folder, f"changed_{number}.py")
            made = f"type('Changed', (load_class({spec!r}),), {attributes!r})"
            file.write_text(f"from folovllm.parts import load_class\n\nChanged = {made}\n", encoding="utf-8")
            changed[name] = f"{file}:Changed"
        yield changed


def real_tokens(exercise: Exercise, parts: Mapping[str, str] | None) -> list[list[int]]:
    """Greedy tokens of a tiny random model, all prompts together, in float32 on plain torch."""
    from folovllm.entrypoints.llm import LLM
    from folovllm.sampling_params import SamplingParams

    milestone = "m1" if exercise.milestone == "m0" else exercise.milestone
    # The fast kernels of m4 change no token, and may have to be built first.
    without = ["m4"] if rung_number(milestone) >= rung_number("m4") else []
    args = {"dtype": "float32", "device": "cpu", "max_model_len": 64, "num_kv_blocks": 40} | exercise.engine
    llm = LLM(tiny_model(), preset=milestone, without=without, skip_tokenizer_init=True, parts=parts, **args)
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False)
    prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def tiny_model() -> str:
    """The folder of a tiny model of random weights, written once to the cache."""
    from folovllm.benchmarks.random_model import checkpoint_folder, write_checkpoint

    folder = checkpoint_folder("tiny")
    write_checkpoint("tiny", folder)
    return str(folder)
