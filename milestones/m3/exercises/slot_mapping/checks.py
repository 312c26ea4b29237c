"""The checks of m3/slot_mapping. numpy only: the table is plain arrays until the worker hands it to the device."""

import random
from typing import Any

import numpy as np

from folovllm.learn.check import Mine, check
from folovllm.worker.block_table import BlockTable


def prediction() -> str:
    table = BlockTable(1, 4, block_size=4)
    table.add_row([7, 2, 9], 0)
    return f"{slots_of(table, 0, [3, 4, 8])}\nThat is 7 * 4 + 3, 2 * 4 + 0 and 9 * 4 + 0."


def slots_of(table: Any, row: int, positions: list[int]) -> list[int]:
    """Returns the slots of several positions of one row."""
    return list(table.slot_mapping(np.full(len(positions), row), np.array(positions)).tolist())


@check("unit", spec="R3.14", hint=1)
def a_sequence_begins_in_its_first_block(mine: Mine) -> None:
    """Positions count from 0: the first token of a sequence has the first slot of its first block."""
    table = mine.cls(2, 4, block_size=4)
    table.add_row([7], 1)
    slots = slots_of(table, 1, [0, 1, 2, 3])
    assert slots == [28, 29, 30, 31], (
        f"a row [7] of blocks of 4: positions 0 to 3 have the slots {slots}, expected [28, 29, 30, 31]"
    )


@check("unit", spec="R3.14", hint=1)
def the_next_block_begins_at_a_multiple(mine: Mine) -> None:
    """In blocks of 4, position 3 is the last of the first block, and position 4 the first of the second."""
    table = mine.cls(1, 4, block_size=4)
    table.add_row([7, 8, 9], 0)
    for position, expected in ((3, 31), (4, 32), (7, 35), (8, 36)):
        (slot,) = slots_of(table, 0, [position])
        assert slot == expected, (
            f"blocks [7, 8, 9] of 4: position {position} has slot {slot}, expected {expected}: block "
            f"{7 + position // 4}, place {position % 4}"
        )


@check("unit", spec="R3.14", hint=2)
def blocks_lie_anywhere(mine: Mine) -> None:
    """The blocks of a sequence are seldom neighbours, and lie in any order. Only the table knows where they are."""
    table = mine.cls(1, 4, block_size=4)
    table.add_row([7, 2], 0)
    slots = slots_of(table, 0, list(range(6)))
    assert slots == [28, 29, 30, 31, 8, 9], (
        f"blocks [7, 2] of 4: positions 0 to 5 have the slots {slots}, expected [28, 29, 30, 31, 8, 9]: a token was "
        "written into a block that its request does not hold"
    )


@check("unit", spec="R3.14", hint=2)
def tokens_of_several_requests_in_one_call(mine: Mine) -> None:
    """The batch is flat: each token brings its own row. Rows come with different numbers of tokens."""
    table = mine.cls(3, 4, block_size=4)
    for row, blocks in enumerate(([7, 2], [5], [1, 6, 3])):
        table.add_row(blocks, row)
    rows, positions = np.array([0, 0, 1, 2, 2, 2]), np.array([3, 4, 0, 7, 8, 9])
    slots = table.slot_mapping(rows, positions)
    expected = [31, 8, 20, 27, 12, 13]
    assert slots.tolist() == expected, (
        f"rows {rows.tolist()}, positions {positions.tolist()}: slots {slots.tolist()}, expected {expected}"
    )
    assert slots.dtype == np.int64, f"the slots are {slots.dtype}, expected int64: index_copy_ of torch takes no other"


@check("unit", spec="R3.14", hint=3)
def a_large_pool_does_not_overflow(mine: Mine) -> None:
    """The table is int32, and a slot may be larger than an int32 can hold."""
    table = mine.cls(1, 2, block_size=16)
    table.add_row([200_000_000], 0)
    (slot,) = slots_of(table, 0, [5])
    assert slot == 3_200_000_005, (
        f"block 200,000,000 of 16: position 5 has slot {slot}, expected 3,200,000,005: the product was "
        "computed in int32"
    )


@check("unit", spec="R3.14", hint=2)
def new_blocks_go_behind_the_old_ones(mine: Mine) -> None:
    """append_row adds to the end of a row, counts what it has added, and takes an empty list."""
    table = mine.cls(2, 4, block_size=4)
    table.add_row([7], 1)
    for blocks in ([2], [], [9, 4]):
        table.append_row(blocks, 1)
    row, n = table.table[1].tolist(), int(table.num_blocks_per_row[1])
    assert (row, n) == ([7, 2, 9, 4], 4), f"[7], then [2], [] and [9, 4]: the row is {row} with {n} blocks"
    assert not table.table[0].any(), f"row 0 belongs to another request, and now is {table.table[0].tolist()}"


@check("unit", spec="R3.7", hint=3)
def a_row_forgets_its_last_request(mine: Mine) -> None:
    """Behind the blocks of a new request the row is 0, the null block, and the next block goes to the right place."""
    table = mine.cls(1, 5, block_size=4)
    table.add_row([7, 2, 9, 4], 0)
    table.add_row([6, 3], 0)
    row = table.table[0].tolist()
    assert row == [6, 3, 0, 0, 0], (
        f"[7, 2, 9, 4] replaced by [6, 3]: the row is {row}. A kernel that reads ahead sees the blocks of a request "
        "that has ended, which belong to others by now"
    )
    table.append_row([8], 0)
    row = table.table[0].tolist()
    assert row == [6, 3, 8, 0, 0], f"[7, 2, 9, 4] replaced by [6, 3], then [8] appended: the row is {row}"


@check("property", spec="R3.14", hint=1)
def every_token_has_a_slot_of_its_own(mine: Mine) -> None:
    """Whatever rows do, the slots of all tokens in the batch differ, and each lies in a block of its own request."""
    for seed in range(120):
        rng = random.Random(seed)
        block_size, num_rows, num_columns = rng.randint(1, 5), 1 + seed // 40, 2 + seed // 40
        table = mine.cls(num_rows, num_columns, block_size)
        run_random_life(table, rng, block_size, num_rows, num_columns)


def run_random_life(table: Any, rng: random.Random, block_size: int, num_rows: int, num_columns: int) -> None:
    """Rows are replaced, grow and move. Compares all slots of all rows with the lists of blocks that they stand for."""
    blocks = list(range(1, num_rows * num_columns + 1))
    held: list[list[int]] = [[] for _ in range(num_rows)]
    story = [f"blocks of {block_size}"]
    for _ in range(8):
        row = rng.randrange(num_rows)
        free = [block for block in blocks if not any(block in other for other in held)]
        if rng.random() < 0.4:
            held[row] = rng.sample(free, min(len(free), rng.randint(1, num_columns)))
            story.append(f"add_row({held[row]}, {row})")
            table.add_row(list(held[row]), row)
        elif len(held[row]) < num_columns and held[row]:
            new = rng.sample(free, min(len(free), 1))
            story.append(f"append_row({new}, {row})")
            held[row] += new
            table.append_row(new, row)
        compare(table, held, block_size, "; ".join(story))


def compare(table: Any, held: list[list[int]], block_size: int, story: str) -> None:
    pairs = [(row, position) for row, blocks in enumerate(held) for position in range(len(blocks) * block_size)]
    if not pairs:
        return
    rows, positions = np.array(pairs).T
    slots = table.slot_mapping(rows, positions).tolist()
    assert len(set(slots)) == len(slots), f"{story}: two tokens share a slot; the slots are {slots}"
    for (row, position), slot in zip(pairs, slots, strict=True):
        block, place = divmod(slot, block_size)
        assert (block, place) == (held[row][position // block_size], position % block_size), (
            f"{story}: position {position} of row {row}, which holds {held[row]}, has slot {slot}: block {block}, "
            f"place {place}"
        )


@check("counters", spec="R3.14", hint=2)
def slots_are_computed_at_once(mine: Mine) -> None:
    """All tokens of a step are looked up together. A loop over tokens would read the table once per token."""
    table = mine.cls(1, 64, block_size=16)
    table.add_row(list(range(1, 65)), 0)
    table.table = table.table.view(CountingArray)
    CountingArray.num_reads = 0
    slots_of(table, 0, list(range(1024)))
    n = CountingArray.num_reads
    assert n < 100, f"slot_mapping of 1,024 tokens read the table {n} times, expected a few: index with whole arrays"


class CountingArray(np.ndarray):
    """An array that counts how often it is indexed."""

    num_reads = 0

    def __getitem__(self, key: Any) -> Any:
        CountingArray.num_reads += 1
        return super().__getitem__(key)
