"""Checks of m9/communication."""

from collections.abc import Mapping
from typing import Any

from folovllm.communication_plan import ALL_GATHER, ALL_REDUCE, SEND, CommunicationPlan
from folovllm.learn.check import Mine, check
from folovllm.model_shapes import shape_architecture
from folovllm.parallel import ModelShard

SMALL = shape_architecture("smollm2-135m")  # 30 layers, hidden 576, vocabulary 49,152


def prediction() -> str:
    calls = CommunicationPlan(SMALL, ModelShard(0, 3, 1, 2)).calls(num_sampled=1)
    return f"{calls[ALL_REDUCE]}\nTwo for each of its 15 layers. The embedding's is in the first stage."


def same(found: Any, wanted: Mapping[str, int], what: str) -> None:
    assert isinstance(found, dict), f"{what} returned {found!r}, expected a dict"
    for operation in {**wanted, **found}:
        mine, right = found.get(operation), wanted.get(operation)
        shown = "nothing" if right is None else f"{right:,}"
        assert mine == right, f"{what} says {operation}: {mine}, expected {shown} (it returned {found})"


@check("unit", spec="R9.10", hint=1)
def one_stage_of_three_parts(mine: Mine) -> None:
    """The example: 61 all-reduces and an all-gather."""
    for rank in range(3):
        plan = mine.cls(SMALL, ModelShard(rank, 3))
        same(plan.calls(4), {ALL_REDUCE: 61, ALL_GATHER: 1}, f"calls(4) of rank {rank} of 3")
        sizes = {ALL_REDUCE: 281_088, ALL_GATHER: 131_072}
        same(plan.bytes(4, 4), sizes, f"bytes(4, 4) of rank {rank} of 3")


@check("unit", spec="R9.10", hint=1)
def one_rank_says_nothing(mine: Mine) -> None:
    """A whole model on one rank: empty dicts."""
    same(mine.cls(SMALL).calls(4), {}, "calls(4) of one rank")
    same(mine.cls(SMALL).bytes(4, 4), {}, "bytes(4, 4) of one rank")


@check("unit", spec="R9.10", hint=2)
def two_stages_without_parts(mine: Mine) -> None:
    """Stages alone: the first sends hidden and residual, the last says nothing."""
    first, last = (mine.cls(SMALL, ModelShard(pp_rank=stage, pp_size=2)) for stage in range(2))
    same(first.calls(4), {SEND: 2}, "calls(4) of the first of 2 stages")
    same(first.bytes(4, 4), {SEND: 2 * 4 * 576 * 2}, "bytes(4, 4) of the first of 2 stages")
    same(last.calls(4), {}, "calls(4) of the last of 2 stages")


@check("unit", spec="R9.10", hint=2)
def parts_and_stages(mine: Mine) -> None:
    """3 parts and 3 stages: the embedding belongs to the first, the logits to the last."""
    wanted = ({ALL_REDUCE: 21, SEND: 2}, {ALL_REDUCE: 20, SEND: 2}, {ALL_REDUCE: 20, ALL_GATHER: 1})
    for stage, right in enumerate(wanted):
        found = mine.cls(SMALL, ModelShard(2, 3, stage, 3)).calls(1)
        same(found, right, f"calls(1) of stage {stage} of 3, part 2 of 3")


@check("unit", spec="R9.10", hint=2)
def nothing_is_sampled(mine: Mine) -> None:
    """A step that only computes the beginning of prompts needs no logits."""
    plan = mine.cls(SMALL, ModelShard(0, 3))
    same(plan.calls(0), {ALL_REDUCE: 61}, "calls(0) of rank 0 of 3")
    same(plan.bytes(512, 0), {ALL_REDUCE: 61 * 512 * 576 * 2}, "bytes(512, 0) of rank 0 of 3")


@check("unit", spec="R9.10", hint=3)
def a_vocabulary_that_does_not_divide(mine: Mine) -> None:
    """49,152 tokens on 9 parts: 5,462 rows on each, the last of them partly padding."""
    found = mine.cls(SMALL, ModelShard(8, 9), dtype_bytes=4).bytes(1, 1)
    same(found, {ALL_REDUCE: 61 * 576 * 4, ALL_GATHER: 5_462 * 4}, "bytes(1, 1) of rank 8 of 9 in fp32")


@check("property", spec="R9.10", hint=3)
def the_stages_add_up(mine: Mine) -> None:
    """Cutting the model into stages moves the all-reduces to other ranks, and changes neither their number nor size."""
    for name in ("smollm2-135m", "qwen3-8b"):
        arch = shape_architecture(name)
        for tp_size in (2, 4, 8):
            whole = mine.cls(arch, ModelShard(0, tp_size))
            for pp_size in (2, 3, 5):
                stages = [mine.cls(arch, ModelShard(0, tp_size, stage, pp_size)) for stage in range(pp_size)]
                for num_tokens, num_sampled in ((1, 1), (700, 3), (256, 0)):
                    case = f"{name}, {tp_size} parts, {pp_size} stages, {num_tokens} tokens, {num_sampled} sampled"
                    found = [stage.bytes(num_tokens, num_sampled) for stage in stages]
                    for operation in (ALL_REDUCE, ALL_GATHER):
                        total = sum(stage.get(operation, 0) for stage in found)
                        one = whole.bytes(num_tokens, num_sampled).get(operation, 0)
                        assert total == one, (
                            f"{case}: {operation} of all stages is {total:,} bytes, of one stage {one:,}"
                        )
                    sends = [stage.get(SEND, 0) for stage in found]
                    row = num_tokens * arch.hidden_size * 2
                    assert sends == [2 * row] * (pp_size - 1) + [0], f"{case}: the stages send {sends} bytes"
