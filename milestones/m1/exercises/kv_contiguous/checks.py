"""The checks of m1/kv_contiguous: places by hand, the formula, token by token against all at once, and what is read."""

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.learn.check import Mine, check

NAN = float("nan")


class Page:
    """A backend with a cache of a few pages, all NaN, and batches on it."""

    def __init__(
        self,
        cls: Any,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        head_size: int = 8,
        size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.spec = AttentionSpec(num_heads, num_kv_heads, head_size, dtype, torch.device("cpu"), size)
        self.backend = cls(self.spec)
        self.cache = torch.full(
            (2, 5, size, num_kv_heads, head_size), NAN, dtype=dtype
        )  # [2, 5 pages, size, kv heads, head_size]

    def batch(self, *requests: tuple[int, int, int]) -> AttentionMetadata:
        """A batch of requests, each (page, tokens that are in the cache, new tokens)."""
        start, slots = [0], []
        for page, computed, new in requests:
            start.append(start[-1] + new)
            slots += [page * self.spec.block_size + p for p in range(computed, computed + new)]
        table = torch.tensor([[page] for page, _, _ in requests], dtype=torch.int32)  # [num_reqs, 1]
        lens = [computed + new for _, computed, new in requests]
        metadata = AttentionMetadata(start, lens, table, torch.tensor(slots), self.spec.block_size)
        self.backend.prepare(metadata)
        return metadata

    def run(self, qkv: tuple[torch.Tensor, ...], metadata: AttentionMetadata) -> torch.Tensor:
        """One step: writes, then attends."""
        query, key, value = qkv
        self.backend.write(key, value, self.cache, metadata)
        return self.backend.forward(query, self.cache, metadata)  # [num_tokens, num_heads, head_size]

    def tensors(self, num_tokens: int, seed: int) -> tuple[torch.Tensor, ...]:
        """Random query, key and value of so many tokens."""
        generator, spec = torch.Generator().manual_seed(seed), self.spec
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        return tuple(torch.randn(num_tokens, n, spec.head_size, generator=generator) for n in heads)


def part(qkv: tuple[torch.Tensor, ...], first: int, last: int) -> tuple[torch.Tensor, ...]:
    return tuple(x[first:last] for x in qkv)


def formula(qkv: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Causal attention of a whole sequence, number by number."""
    query, key, value = (x.double() for x in qkv)
    group = query.shape[1] // key.shape[1]
    out = torch.zeros_like(query)
    for i in range(len(query)):
        for head in range(query.shape[1]):
            k, v = key[: i + 1, head // group], value[: i + 1, head // group]  # each [i + 1, head_size]
            weights = ((k @ query[i, head]) / math.sqrt(query.shape[2])).softmax(dim=0)  # [i + 1]
            out[i, head] = weights @ v
    return out.float()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; NaN counts as infinite."""
    return float((a - b).abs().nan_to_num(nan=math.inf).max())


def prediction() -> str:
    page, computed, read = Page(TorchNaiveBackend), [], []
    for cached, new in ((0, 5), (5, 1), (6, 1), (7, 1)):
        metadata = page.batch((1, cached, new))
        computed.append(len(metadata.slot_mapping))
        read.append(len(metadata.prepared[0][0]))
    return f"the steps compute the keys of {computed} tokens and read {read}; without a cache they would compute {read}"


@check("unit", spec="R1.11", hint=1)
def a_token_goes_to_its_position(mine: Mine) -> None:
    """The token at position p is entry p of its request's page, counted from 0; no other entry changes."""
    page = Page(mine.cls, num_heads=1, num_kv_heads=1, head_size=1)
    key = torch.arange(10.0, 13.0).view(3, 1, 1)  # [3, 1, 1]
    page.backend.write(key, key + 100, page.cache, page.batch((3, 2, 2), (1, 0, 1)))
    for which, name, base in ((0, "keys", 10.0), (1, "values", 110.0)):
        found = {
            (block, entry): float(page.cache[which, block, entry])
            for block in range(5)
            for entry in range(16)
            if not page.cache[which, block, entry].isnan()
        }
        expected = {(3, 2): base, (3, 3): base + 1, (1, 0): base + 2}
        assert found == expected, (
            f"a request on page 3 with 2 tokens in the cache wrote 2 more, and one on page 1 wrote its first: the "
            f"(page, position) -> {name} are {found}, expected {expected}"
        )


@check("unit", spec="R1.16", hint=2)
def a_prompt_gives_the_formula(mine: Mine) -> None:
    """A prompt in an empty page gets softmax(q k / sqrt(d)) v over the keys up to each token's own."""
    for heads, kv_heads in ((1, 1), (4, 2), (6, 1)):
        page = Page(mine.cls, heads, kv_heads)
        qkv = page.tensors(6, seed=1)
        got = page.run(qkv, page.batch((2, 0, 6)))
        assert got.shape == qkv[0].shape, f"the output is {list(got.shape)}, expected that of the query"
        wrong = [i for i in range(6) if error(got[i], formula(qkv)[i]) > 1e-5]
        assert not wrong, (
            f"{heads} heads, {kv_heads} KV heads, 6 tokens: the rows {wrong} are off by up to "
            f"{error(got, formula(qkv)):.3g}. Query head h reads KV head h // {heads // kv_heads}, and row i the keys "
            "0 .. i; an infinite error is a NaN, which only places outside the sequence hold"
        )


@check("unit", spec="R1.16", hint=3)
def later_queries_see_the_cache(mine: Mine) -> None:
    """Query j of a later step stands behind all cached tokens, so it sees them and the new ones up to itself."""
    page = Page(mine.cls)
    qkv = page.tensors(7, seed=2)
    page.run(part(qkv, 0, 4), page.batch((1, 0, 4)))
    got, expected = page.run(part(qkv, 4, 7), page.batch((1, 4, 3))), formula(qkv)[4:]
    wrong = [i for i in range(3) if error(got[i], expected[i]) > 1e-5]
    assert not wrong, (
        f"3 queries on 7 keys: the rows {wrong} are off by up to {error(got, expected):.3g}. Row 0 is at position 4 "
        "and sees 5 keys; a triangle that starts top left gives it only 1"
    )


@check("unit", spec="R1.11", hint=2)
def more_than_one_page_is_right_or_refused(mine: Mine) -> None:
    """With m3's small pages, write goes by slots and is right. forward is right, too, or it says what is wrong."""
    page = Page(mine.cls, size=4)
    qkv, table = page.tensors(6, seed=5), torch.tensor([[3, 1]], dtype=torch.int32)  # [1, 2]
    slots = torch.tensor([12, 13, 14, 15, 4, 5])
    metadata = AttentionMetadata([0, 6], [6], table, slots, block_size=4)
    page.backend.prepare(metadata)
    page.backend.write(qkv[1], qkv[2], page.cache, metadata)
    off = error(page.cache.flatten(1, 2)[:, slots], torch.stack(qkv[1:]))
    assert off == 0, "6 tokens with the slots 12 to 15, 4 and 5 (pages 3 and 1 of 4 tokens) are not in their slots"
    try:
        got = page.backend.forward(qkv[0], page.cache, metadata)
    except ValueError:
        return
    assert error(got, formula(qkv)) < 1e-5, (
        "a request of 6 tokens on two pages of 4 got a wrong answer: raise ValueError if seq_lens[i] > block_size"
    )


@check("unit", spec="R1.16", hint=2)
def a_cache_in_bf16_is_computed_in_float32(mine: Mine) -> None:
    """A bf16 number has 8 bits: if every sum is rounded to it, the errors add up. Only the result is rounded."""
    page = Page(mine.cls, size=64, dtype=torch.bfloat16)
    qkv = tuple(x.bfloat16() for x in page.tensors(64, seed=6))
    got, exact = page.run(qkv, page.batch((2, 0, 64))), formula(qkv)
    assert got.dtype == torch.bfloat16, f"the query is torch.bfloat16 and the output {got.dtype}, expected the same"
    once = float((exact.bfloat16().float() - exact).abs().mean())
    mean = float((got.float() - exact).abs().mean())
    assert mean <= 1.2 * once, (
        f"64 tokens in bf16: the numbers are off by {mean:.2g} on average, and rounding once costs {once:.2g}: the "
        "scores or the weights were rounded to bf16 on the way"
    )


@check("property", spec="R1.16", hint=1)
def token_by_token_equals_all_at_once(mine: Mine) -> None:
    """However a sequence is cut into steps, every token gets what the formula gives it."""
    generator = torch.Generator().manual_seed(0)
    for length in range(2, 14):
        page = Page(mine.cls)
        qkv, done, cuts, rows = page.tensors(length, seed=length), 0, [], []
        while done < length:
            new = min(int(torch.randint(1, 5, (), generator=generator)), length - done)
            rows.append(page.run(part(qkv, done, done + new), page.batch((4, done, new))))
            done, cuts = done + new, [*cuts, new]
            off = error(torch.cat(rows), formula(qkv)[:done])
            assert off < 1e-5, (
                f"{length} tokens in steps of {cuts}: after {done} tokens the outputs are off by {off:.3g} from one "
                "pass over everything"
            )


@check("property", spec="R1.17", hint=2)
def requests_together_equal_alone(mine: Mine) -> None:
    """Requests of one batch have pages of their own: what one gets does not depend on the others."""
    lengths = [(1, 3, 1), (4, 0, 5), (2, 9, 1), (3, 1, 2)]  # page, tokens in the cache, new tokens
    page = Page(mine.cls)
    qkvs = [page.tensors(computed + new, seed=number) for number, computed, new in lengths]
    for (number, computed, _), qkv in zip(lengths, qkvs, strict=True):
        if computed:
            page.run(part(qkv, 0, computed), page.batch((number, 0, computed)))
    new_rows = [part(qkv, computed, computed + new) for (_, computed, new), qkv in zip(lengths, qkvs, strict=True)]
    flat = tuple(torch.cat([rows[i] for rows in new_rows]) for i in range(3))
    together = page.run(flat, page.batch(*lengths)).split([new for _, _, new in lengths])
    for (number, computed, new), qkv, got in zip(lengths, qkvs, together, strict=True):
        off = error(got, formula(qkv)[computed:])
        assert off < 1e-5, (
            f"the request on page {number} ({computed} tokens in the cache, {new} new) is off by {off:.3g} beside "
            "three other requests"
        )


@check("counters", spec="R1.16", hint=2)
def a_step_reads_what_the_sequence_holds(mine: Mine) -> None:
    """The work of a decode step grows with the sequence and not with the page."""
    sizes = {(size, length): numbers_made(mine.cls, size, length) for size in (256, 1024) for length in (100, 200)}
    small, large, double = sizes[256, 100], sizes[1024, 100], sizes[256, 200]
    assert large <= 1.1 * small, (
        f"a decode step on 100 tokens makes {small:,} numbers with a page of 256 and {large:,} with one of 1,024: it "
        "reads the whole page, and most of that is not the request's"
    )
    assert double <= 2.2 * small, (
        f"a decode step makes {small:,} numbers on 100 tokens and {double:,} on 200: the work of a step must be linear "
        "in the length, so it must not compute the attention of older tokens again"
    )


def numbers_made(cls: Any, size: int, length: int) -> int:
    """How many numbers all new tensors hold that one decode step makes."""
    page = Page(cls, size=size)
    qkv = page.tensors(length, seed=3)
    page.run(part(qkv, 0, length - 1), page.batch((1, 0, length - 1)))
    metadata = page.batch((1, length - 1, 1))
    with Counter() as counter:
        page.run(part(qkv, length - 1, length), metadata)
    return counter.numbers


class Counter(TorchDispatchMode):
    """Adds up the sizes of the tensors that operators make, without views and what is changed in place."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        if not func.is_view and not func._schema.is_mutable:
            self.numbers += sum(tensor.numel() for tensor in results if isinstance(tensor, torch.Tensor))
        return result
