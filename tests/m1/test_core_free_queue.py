"""FreeKVCacheBlockQueue: the order of free blocks, its errors, and a state machine against a plain list (R1.10)."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from folovllm.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

pytestmark = pytest.mark.m1


def make_queue(n: int) -> tuple[FreeKVCacheBlockQueue, list[KVCacheBlock]]:
    blocks = [KVCacheBlock(i) for i in range(n)]
    return FreeKVCacheBlockQueue(blocks), blocks


def order(queue: FreeKVCacheBlockQueue) -> list[int]:
    return [block.block_id for block in queue.get_all_free_blocks()]


def links(block: KVCacheBlock) -> tuple[KVCacheBlock | None, KVCacheBlock | None]:
    return block.prev_free_block, block.next_free_block


def test_blocks_come_out_in_the_order_they_went_in() -> None:
    queue, blocks = make_queue(3)
    assert queue.num_free_blocks == 3
    assert [queue.popleft() for _ in range(3)] == blocks
    assert queue.num_free_blocks == 0 and order(queue) == []


def test_popped_and_removed_blocks_have_no_links() -> None:
    queue, blocks = make_queue(3)
    popped = queue.popleft()
    queue.remove(blocks[2])
    assert links(popped) == links(blocks[2]) == (None, None)


def test_pop_from_an_empty_queue() -> None:
    queue, _ = make_queue(1)
    queue.popleft()
    with pytest.raises(ValueError, match="No free blocks available"):
        queue.popleft()


def test_empty_from_the_start_then_filled() -> None:
    queue, _ = make_queue(0)
    with pytest.raises(ValueError, match="No free blocks available"):
        queue.popleft()
    queue.append(KVCacheBlock(7))
    assert order(queue) == [7]


@pytest.mark.parametrize(("victim", "left"), [(0, [1, 2, 3]), (2, [0, 1, 3]), (3, [0, 1, 2])])
def test_remove_at_head_middle_and_tail(victim: int, left: list[int]) -> None:
    queue, blocks = make_queue(4)
    queue.remove(blocks[victim])
    assert order(queue) == left and queue.num_free_blocks == 3


def test_remove_of_a_block_that_is_not_in_the_queue() -> None:
    queue, blocks = make_queue(3)
    queue.remove(blocks[1])
    with pytest.raises(RuntimeError, match="not in the free queue"):
        queue.remove(blocks[1])
    assert order(queue) == [0, 2] and queue.num_free_blocks == 2


def test_append_twice_is_our_bug() -> None:
    queue, blocks = make_queue(2)
    with pytest.raises(AssertionError, match="already in the free queue"):
        queue.append(blocks[0])


def test_append_n_goes_to_the_tail_in_the_given_order() -> None:
    queue, _ = make_queue(4)
    taken = queue.popleft_n(3)
    queue.append_n(taken[::-1])
    assert order(queue) == [3, 2, 1, 0]


def test_prepend_n_goes_to_the_head_as_a_group_in_the_given_order() -> None:
    queue, _ = make_queue(4)
    taken = queue.popleft_n(3)
    queue.prepend_n([taken[2], taken[0], taken[1]])
    assert order(queue) == [2, 0, 1, 3]
    assert queue.popleft().block_id == 2


def test_popleft_n_of_too_many_takes_nothing() -> None:
    queue, _ = make_queue(3)
    with pytest.raises(ValueError, match="No 4 free blocks available, only 3"):
        queue.popleft_n(4)
    assert order(queue) == [0, 1, 2] and queue.num_free_blocks == 3
    assert queue.popleft_n(0) == []


class QueueMachine(RuleBasedStateMachine):
    """The linked list against a Python list that does the same slowly."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.free = make_queue(8)
        self.free = list(self.free)
        self.taken: list[KVCacheBlock] = []

    @rule()
    def popleft(self) -> None:
        if not self.free:
            with pytest.raises(ValueError):
                self.queue.popleft()
            return
        block = self.queue.popleft()
        assert block is self.free.pop(0)
        self.taken.append(block)

    @rule(n=st.integers(0, 10))
    def popleft_n(self, n: int) -> None:
        if n > len(self.free):
            with pytest.raises(ValueError):
                self.queue.popleft_n(n)
            return
        blocks = self.queue.popleft_n(n)
        assert blocks == self.free[:n]
        del self.free[:n]
        self.taken += blocks

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if not self.free:
            return
        block = data.draw(st.sampled_from(self.free))
        self.queue.remove(block)
        self.free.remove(block)
        self.taken.append(block)

    @rule(data=st.data())
    def remove_taken(self, data: st.DataObject) -> None:
        if self.taken:
            with pytest.raises(RuntimeError):
                self.queue.remove(data.draw(st.sampled_from(self.taken)))

    @rule(data=st.data(), front=st.booleans())
    def give_back(self, data: st.DataObject, front: bool) -> None:
        blocks = data.draw(st.permutations(self.taken))
        blocks = blocks[: data.draw(st.integers(0, len(blocks)))]
        if front:
            self.queue.prepend_n(blocks)
            self.free = blocks + self.free
        else:
            self.queue.append_n(blocks)
            self.free += blocks
        self.taken = [block for block in self.taken if block not in blocks]

    @invariant()
    def same_order_both_ways(self) -> None:
        assert self.queue.get_all_free_blocks() == self.free
        assert self.queue.num_free_blocks == len(self.free)
        for before, after in zip(self.free, self.free[1:], strict=False):
            assert before.next_free_block is after and after.prev_free_block is before
        assert all(links(block) == (None, None) for block in self.taken)


def test_state_machine_against_a_list() -> None:
    run_state_machine_as_test(
        QueueMachine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
    )
