"""Checks of m4/merge_lse."""

import math
from typing import Any

import torch

from folovllm.attention.backend import AttentionSpec
from folovllm.attention.backends.torch_flash import TorchFlashBackend
from folovllm.learn.check import Mine, check
from folovllm.learn.defaults import check_tokens, with_attributes
from folovllm.learn.exercise import get_exercise

INF = float("inf")


def prediction() -> str:
    out, _ = merge(TorchFlashBackend, [6.0, 2.0, 0.0], [math.log(3), math.log(1), -INF])
    return f"{out:.2f}\nThe sums of exp(score) are 3, 1 and 0, so the answer is (6.0 * 3 + 2.0 * 1) / 4."


def backend(cls: Any, **attributes: Any) -> Any:
    made = cls(AttentionSpec(1, 1, 4, torch.float32, torch.device("cpu"), block_size=4))
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def merge(cls: Any, outs: list[float], lses: list[float]) -> tuple[float, float]:
    """Merges parts whose answers are single numbers."""
    answer = backend(cls).merge_partials([torch.tensor([x]) for x in outs], [torch.tensor(x) for x in lses])
    assert isinstance(answer, tuple) and len(answer) == 2, f"merge_partials returned {answer}, expected (out, lse)"
    out, lse = answer
    assert list(out.shape) == [1] and list(lse.shape) == [], (
        f"outs of shape [1] and lses of shape [] gave out {list(out.shape)} and lse {list(lse.shape)}: the result has "
        "the shapes of a part"
    )
    return out.item(), lse.item()


@check("unit", spec="R4.13", hint=1)
def the_heavier_part_counts_more(mine: Mine) -> None:
    """Each part counts by its share of the weight, which its lse tells."""
    out, lse = merge(mine.cls, [4.8, 2.8], [math.log(10), math.log(20)])
    assert abs(out - 104 / 30) < 1e-4, (
        f"4.8 with a sum of 10 and 2.8 with a sum of 20 gave {out:.4f}, expected {104 / 30:.4f}: a third of the "
        "weight is in part 0 and two thirds are in part 1"
    )
    assert abs(lse - math.log(30)) < 1e-4, f"their lse is {lse:.4f}, expected log 30 = {math.log(30):.4f}"


@check("unit", spec="R4.13", hint=2)
def merged_parts_can_be_merged_again(mine: Mine) -> None:
    """Merging is associative, since the result has an lse of its own."""
    outs, lses = [1.0, 5.0, -2.0], [0.3, 2.0, 1.0]
    whole = merge(mine.cls, outs, lses)
    first = merge(mine.cls, outs[:2], lses[:2])
    twice = merge(mine.cls, [first[0], outs[2]], [first[1], lses[2]])
    assert abs(whole[0] - twice[0]) < 1e-4 and abs(whole[1] - twice[1]) < 1e-4, (
        f"three parts at once give (out, lse) = {whole}, two of them first and then the third {twice}: lse must be the "
        "log of the whole sum"
    )


def spied(cls: Any, num_keys: int, num_splits: int) -> list[tuple[int, list[int]]]:
    """(first_key, slots) of each call of attend_tiles that attend_split makes."""
    calls: list[tuple[int, list[int]]] = []

    class Spied(cls):  # type: ignore[misc]
        def attend_tiles(
            self, q: Any, by_slot: Any, slots: Any, position: int, num_rows: int, first_key: int = 0
        ) -> Any:
            calls.append((first_key, slots.tolist()))
            return super().attend_tiles(q, by_slot, slots, position, num_rows, first_key)

    slots = torch.arange(num_keys) + 100
    by_slot, q = torch.zeros(2, 100 + num_keys, 1, 4), torch.zeros(1, 1, 4)
    backend(Spied, NUM_SPLITS=num_splits).attend_split(q, by_slot, slots, num_keys - 1, 1)
    return calls


@check("unit", spec="R4.13", hint=3)
def every_key_is_in_one_part(mine: Mine) -> None:
    """The parts are neighbouring keys in order, as equal as possible, and each is told where it begins."""
    for num_keys, num_splits in ((9, 3), (10, 3), (2, 3), (7, 1), (1, 4)):
        calls = spied(mine.cls, num_keys, num_splits)
        case, sizes = f"{num_keys} keys in {num_splits} parts", [len(slots) for _, slots in calls]
        read = [slot - 100 for _, slots in calls for slot in slots]
        assert sorted(read) == list(range(num_keys)), f"{case}: attend_tiles read the keys {read}, expected each once"
        assert len(calls) <= num_splits and 0 not in sizes, (
            f"{case}: the parts have {sizes} keys, expected at most {num_splits} parts, none of them empty: to attend "
            "to no key is a call for nothing"
        )
        limit = -(-num_keys // num_splits)
        assert max(sizes) <= limit, (
            f"{case}: the parts have {sizes} keys, expected at most {limit} in each: a step waits for its largest part"
        )
        starts = [first_key for first_key, _ in calls]
        assert starts == [slots[0] - 100 for _, slots in calls], (
            f"{case}: first_key was {starts}, and the parts begin at {[slots[0] - 100 for _, slots in calls]}: the "
            "causal mask is taken from it"
        )


@check("unit", spec="R4.13", hint=2)
def every_row_has_its_own_shares(mine: Mine) -> None:
    """A part has an lse per row and KV head, and one share of it counts for all numbers of a row's answer."""
    outs = [torch.tensor([[[1.0, 2.0, 3.0, 4.0]] * 3] * 2), torch.zeros(2, 3, 4)]  # [2 KV heads, 3 rows, head size 4]
    lses = [torch.zeros(2, 3), torch.tensor([[0.0, math.log(3), math.log(7)]] * 2)]
    out, lse = backend(mine.cls).merge_partials(outs, lses)
    assert list(out.shape) == [2, 3, 4] and list(lse.shape) == [2, 3], (
        f"outs of shape [2, 3, 4] and lses of shape [2, 3] gave out {list(out.shape)} and lse {list(lse.shape)}: the "
        "result has the shapes of a part"
    )
    found, wanted = out[1, :, 3].tolist(), [2.0, 1.0, 0.5]  # 4.0 times the shares 1/2, 1/4 and 1/8
    assert all(abs(a - b) < 1e-4 for a, b in zip(found, wanted, strict=True)), (
        f"part 0 holds 1/2, 1/4 and 1/8 of the weight of three rows; its number 4.0 became {found}, expected {wanted}"
    )


@check("unit", spec="R4.14", hint=3)
def a_part_that_saw_nothing_has_no_weight(mine: Mine) -> None:
    """Its lse is -inf. Where no part saw any key, the answer is 0 and not NaN."""
    out, lse = merge(mine.cls, [5.0, 0.0], [1.5, -INF])
    assert abs(out - 5.0) < 1e-5 and abs(lse - 1.5) < 1e-5, f"a part of lse -inf changed 5.0, 1.5 to {out}, {lse}"
    out, lse = merge(mine.cls, [0.0, 0.0], [-INF, -INF])
    assert (out, lse) == (0.0, -INF), f"two parts that saw nothing gave out {out}, lse {lse}; expected 0 and -inf"


@check("unit", spec="R4.13", hint=3)
def large_scores_do_not_overflow(mine: Mine) -> None:
    """exp(lse) overflows in fp32 from 89 on, and differences of lse do not."""
    for shift in (1000.0, -1000.0):
        out, lse = merge(mine.cls, [4.8, 2.8], [math.log(10) + shift, math.log(20) + shift])
        assert abs(out - 104 / 30) < 1e-2, f"with lse around {shift:.0f} the answer is {out}, expected {104 / 30:.4f}"
        assert abs(lse - shift - math.log(30)) < 1e-2, f"with lse around {shift:.0f} the lse of both is {lse}"


@check("property", spec="R4.13", hint=2)
def any_split_gives_the_same_answer(mine: Mine) -> None:
    """However many parts the keys are cut into, the answer is that of one part: prompts, chunks and single queries."""
    for seed in range(1, 40):
        generator = torch.Generator().manual_seed(seed)
        rows, cached, splits = (int(torch.randint(1, 2 + seed, (1,), generator=generator)) for _ in range(3))
        q = torch.randn(2, 2 * rows, 4, generator=generator) * (1 + seed)
        by_slot = torch.randn(2, cached + rows, 2, 4, generator=generator)
        slots = torch.randperm(cached + rows, generator=generator)
        # The whole comes from the engine's own class, which does not split.
        whole = backend(mine.reference, NUM_SPLITS=1).attend_tiles(q, by_slot, slots, cached, rows)
        parts = backend(mine.cls, NUM_SPLITS=splits, BLOCK_KV=8).attend_split(q, by_slot, slots, cached, rows)
        for name, found, wanted in zip(("out", "lse"), parts, whole, strict=True):
            error = (found - wanted).abs().max().item()
            assert error < 1e-3, (
                f"{rows} queries behind {cached} cached tokens, the keys in {splits} parts: {name} is {error:.3g} away "
                "from the answer in one part"
            )


@check("engine", spec="R4.13", hint=3)
def same_tokens_with_split_keys(mine: Mine) -> None:
    """A real engine, with the keys in 3 parts and tiles of 4 queries, generates the same tokens as unsplit."""
    with with_attributes(mine.parts, BLOCK_Q=4, BLOCK_KV=8, NUM_SPLITS=3) as parts:
        check_tokens(get_exercise("m4", "merge_lse"), parts)
