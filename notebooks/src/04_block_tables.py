# %% [markdown]
# # 04 · Block tables, and where the memory goes
#
# Each token of a running request leaves its key and value (K/V) in memory, and the final length of a request is unknown until
# it ends. Reserving room for the longest possible answer leaves most of the memory empty. vLLM cuts the memory into small
# **blocks**, gives a request a block when one of its tokens needs it, and keeps a **table** of which blocks are whose.
# In this notebook the engine's own block pool does that, and you count every slot.
#
# *25 minutes. Read [learn/03](../docs/learn/03_paged_kv_cache.md) first. **Predict** asks before an experiment, and **Answer** follows it;
# `viz.ask("04.1", guess=2)` has your guess judged. Next: [05](05_attention_tiles.ipynb).*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import sys
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from matplotlib import pyplot as plt

from folovllm import viz
from folovllm.attention.backend import AttentionMetadata, AttentionSpec, sequence_slots
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.benchmarks.workloads import make_workload
from folovllm.config import EngineConfig
from folovllm.core.block_pool import BlockPool
from folovllm.core.kv_cache_manager import KVCacheManager
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor
from folovllm.learn.three_requests import EXAMPLES, example_core, example_request, run_example
from folovllm.learn.toy_engine import make_request
from folovllm.model_shapes import shape_architecture
from folovllm.worker.block_table import BlockTable

torch.set_num_threads(1)
viz.style()
COLOURS = viz.colours_of(EXAMPLES)
BLOCK_SIZE = 4

# %% [markdown]
# ## Three requests in blocks of 4
#
# These are the requests of all learning pages. Request c arrives before step 2.

# %%
viz.table(
    ["request", "prompt", "prompt tokens", "tokens to generate"],
    [[name, e.text, len(e.prompt_token_ids), e.max_tokens] for name, e in EXAMPLES.items()],
)

# %%
viz.ask("04.1")

# %%
core = example_core(block_size=BLOCK_SIZE, num_kv_blocks=10)
pool = core.scheduler.kv_cache_manager.block_pool


def free_list(pool):
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


steps, free_before, free_after = [], [], []
queue = free_list(pool)
for step in run_example(core):
    steps.append(step)
    free_before.append(queue)
    queue = free_list(pool)
    free_after.append(queue)

# %% [markdown]
# Now look. "5 = c0" reads: physical block 5 is block 0 of request c. Full squares hold K/V, hatched ones are reserved and empty, grey ones
# are free. Block 0 is the null block, which no request ever gets.

# %%
def draw(ax, step, num_blocks, columns):
    lengths = {name: step.start[name] + n for name, n in step.scheduled.items()}
    viz.block_map(ax, step.blocks, lengths, num_blocks, BLOCK_SIZE, COLOURS, columns)
    said = [f"{name} {table}" for name, table in step.blocks.items()]
    said += [f"{name} is preempted" for name in step.preempted]
    said += [f"{name} waits" for name in step.waiting if name not in step.preempted]
    ax.set_title(f"step {step.number}: " + ", ".join(said))
    ax.set_anchor("W")


shown = (0, 1, 2, 5)
figure, axes = plt.subplots(len(shown), 1, figsize=(9, 1.35 * len(shown)))
for ax, number in zip(axes, shown):
    draw(ax, steps[number], num_blocks=10, columns=10)

# %%
viz.answer("04.1", next(step.number for step in steps if len(step.blocks["b"]) == 2))

# %% [markdown]
# In step 5, b gets block 8 as its third and not block 7, which has a smaller number and is free as well. Free blocks stand in a queue, and block 8 is
# at its head then. The section on the free queue says why.

# %% [markdown]
# ## From a position to a slot
#
# Slots are numbered through all blocks: block 5 has the slots 20 to 23. The worker computes the slots of all new tokens of a step at once:

# %%
viz.source(BlockTable.slot_mapping)

# %%
viz.ask("04.2")

# %%
slots = sequence_slots(torch.tensor([2, 1, 5]), 12, BLOCK_SIZE).tolist()
print("slots of the positions 0 to 11:", slots)

# %%
viz.answer("04.2", abs(slots[4] - slots[3]), last=slots[3], first=slots[4])

# %% [markdown]
# The other direction is as useful when you debug a wrong table: which position is in a given slot? Return the position, or -1 if the slot
# is in none of the request's blocks.

# %%
# Your turn: replace the body.
def position_of(table, slot, block_size):
    raise NotImplementedError  # e.g. position_of([2, 1, 5], 21, 4) is 9

# %%
def engine_position_of(table, slot, block_size):
    slots = sequence_slots(torch.tensor(table), len(table) * block_size, block_size).tolist()
    return slots.index(slot) if slot in slots else -1


POSITIONS = [([2, 1, 5], 21, 4), ([2, 1, 5], 8, 4), ([7, 2], 47, 16), ([2, 1, 5], 12, 4)]
POSITIONS = [(case, engine_position_of(*case)) for case in POSITIONS]
viz.your_turn("04.t1", position_of, POSITIONS)

# %% [markdown]
# ## When the blocks run out
#
# The same requests, and only 6 usable blocks. c arrives before step 2 and needs 3 blocks for its 12 prompt tokens.

# %%
viz.ask("04.3")

# %%
tight = list(run_example(example_core(block_size=BLOCK_SIZE, num_kv_blocks=7)))

# %%
figure, axes = plt.subplots(4, 1, figsize=(9, 5.8))
for ax, number in zip(axes, (3, 4, 5, 6)):
    draw(ax, tight[number], num_blocks=7, columns=7)

# %%
viz.answer("04.3", 6 - sum(map(len, tight[3].blocks.values())))

# %% [markdown]
# Before step 4, when a has left, the blocks 1, 2, 5 and 6 are free. These are 16 slots, but no 12 slots in a row: a cache in one piece would
# have refused c. In step 5, b and c each need one more block, and one is free. b gets it, c is preempted, and in step 6 it comes back with four
# blocks (notebook 03 shows why).
#
# The scheduler asks for blocks with `allocate_slots`. Its contract: it returns the **new** blocks, which may be an empty list, or `None` if the
# tokens do not fit, and then **nothing has changed**. Write the core of it on plain lists. `owned` is the request's table and `free` is the free
# queue; change both in place.

# %%
# Your turn: replace the body.
def allocate(owned, free, num_slots, block_size):
    """Lets `owned` hold `num_slots` slots in all. Takes blocks from the front of `free`, and returns the new ones or None."""
    raise NotImplementedError

# %%
def outcome(owned, free, num_slots, block_size):
    """What your function returned, and what it left of the two lists."""
    returned = allocate(owned, free, num_slots, block_size)
    return {"returned": returned, "owned": owned, "free": free}


CALLS = [([], [5, 6, 7], 5, 4), ([5, 6], [7, 8], 7, 4), ([5, 6], [7, 8], 9, 4), ([5], [7, 8], 16, 4), ([], [3], 64, 64)]


def engine_outcome(owned, free, num_slots, block_size):
    """The same by the engine's manager."""
    pool = BlockPool(10)
    blocks = pool.get_new_blocks(9)
    pool.free_blocks([blocks[i - 1] for i in free])
    manager = KVCacheManager(block_size, 1024, pool)
    manager.req_to_blocks["r"] = [blocks[i - 1] for i in owned]
    request = make_request("r", 100)
    request.num_computed_tokens = len(owned) * block_size - block_size // 2 if owned else 0
    returned = manager.allocate_slots(request, num_slots - request.num_computed_tokens)
    ids = None if returned is None else [block.block_id for block in returned]
    return {"returned": ids, "owned": manager.get_block_ids("r")[0], "free": free_list(pool)}


ALLOCATED = [(call, engine_outcome(*call)) for call in CALLS]
viz.your_turn("04.t2", outcome, ALLOCATED)

# %% [markdown]
# The part of the engine's version that does this. The hits belong to prefix caching (notebook 07). There are none here.

# %%
viz.source(KVCacheManager.allocate_slots, "num_held =", "return new_blocks")

# %% [markdown]
# ## The order of the free queue
#
# Back to the first run, with 9 usable blocks. A request gives its blocks back in reverse, the last one first. (If prefix caching is on, blocks with
# a text that may come again go to the tail of the queue, and the beginning of a text is kept longest. See notebook 07.) Prefix caching is off
# here, so no later request can find anything useful in the blocks, and the pool puts them at the **head**. The next request takes blocks from the
# head.

# %%
viz.ask("04.4", a=steps[3].blocks["a"], c=steps[3].blocks["c"])

# %%
viz.table(
    ["step", "free queue before the step, head first", "after the step", "finished"],
    [
        [step.number, " ".join(map(str, before)), " ".join(map(str, after)),
         ", ".join(name for name in step.scheduled if not any(name in later.scheduled for later in steps[step.number + 1 :]))]
        for step, before, after in list(zip(steps, free_before, free_after))[:5]
    ],
)  # fmt: skip

# %%
queue = free_after[3]
viz.answer("04.4", queue)

# %% [markdown]
# In step 5, b computes its last token, in position 8, and then it finishes. What is the queue after that step?

# %%
# Your turn: a list of block numbers, head first.
queue_after_step_5 = None

# %%
viz.your_turn("04.t3", queue_after_step_5, free_after[5])

# %% [markdown]
# ## What is wasted
#
# A request wastes only the empty end of its last block: between 0 and B - 1 slots for blocks of B tokens. Workload A is 32 requests of
# 227 tokens on average, of which the last one is never computed.

# %%
viz.ask("04.5")

# %%
workload = make_workload("A", 49152).requests
lengths = [len(r.prompt_token_ids) + r.output_len - 1 for r in workload]  # the last token is never computed
SIZES = (1, 4, 16, 64, 256, 2048)


def wasted(block_size):
    """Reserved and unused slots of each request at its end."""
    return [-length % block_size for length in lengths]


share = {size: 100 * sum(wasted(size)) / (sum(lengths) + sum(wasted(size))) for size in SIZES}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.bar(range(len(SIZES)), share.values(), color="#777777")
left.set_xticks(range(len(SIZES)), [*map(str, SIZES[:-1]), "2048\n(M2)"])
left.set(xlabel="block size", title="% of the reserved slots unused")
for place, percent in enumerate(share.values()):
    left.text(place, percent + 1, f"{percent:.1f}", ha="center", size=9)
means = [np.mean(wasted(size)) for size in SIZES[1:]]
right.loglog(SIZES[1:], means, "o-", color="#333333")
right.loglog(SIZES[1:], [(size - 1) / 2 for size in SIZES[1:]], "--", color="#D55E00")
right.text(13, 18, "measured", color="#333333", ha="right")
right.text(80, 20, "(B - 1) / 2", color="#D55E00")
right.text(2048, means[-1] * 1.25, "one block of 2,048\nfor each request", ha="right", va="bottom", size=8)
right.set(xlabel="block size B", title="unused slots per request", ylim=(1, 8000))
right.set_xticks(SIZES[1:], SIZES[1:])
right.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
right.minorticks_off();

# %%
viz.answer("04.5", share[16], unused=np.mean(wasted(16)), used=np.mean(lengths))

# %% [markdown]
# ## The same memory, more requests
#
# 8 blocks of 2,048 tokens (M2) are 1,024 blocks of 16 (M3). Both engines get workload A, the same scheduler and the same memory. (The page
# measures with more memory, so its numbers are larger.)

# %%
NUM_LONG_BLOCKS = 2 if FAST else 8  # you can change it

# %%
viz.ask("04.6", NUM_LONG_BLOCKS=NUM_LONG_BLOCKS)

# %%
def utilisation(rung, num_blocks):
    """The used share of the reserved slots, and the requests that run, in every step of workload A."""
    config = EngineConfig.from_args(preset=rung, max_model_len=2048, num_kv_blocks=num_blocks + 1)
    core = EngineCore(config.resolve(shape_architecture("smollm2-135m"), "cpu"), FakeExecutor())
    for i, r in enumerate(workload):
        core.add_request(make_request(f"r{i}", r.prompt_token_ids, max_tokens=r.output_len))
    curve = []
    while core.has_unfinished_requests():
        scheduled = core.scheduler.schedule()
        stats = core.stats()  # while the step runs
        curve.append((100 * stats.num_used_slots / stats.num_reserved_slots, stats.num_running))
        core.scheduler.update_from_output(scheduled, core.executor.sample(core.executor.execute(scheduled)))
    return list(zip(*curve))


m2, m3 = utilisation("m2", NUM_LONG_BLOCKS), utilisation("m3", NUM_LONG_BLOCKS * 128)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharex=True)
for (used, running), name, colour in ((m2, "M2: one block of 2,048 each", "#D55E00"), (m3, "M3: blocks of 16", "#0072B2")):
    left.plot(used, color=colour, label=f"{name}, mean {np.mean(used):.0f} %")
    right.plot(running, color=colour, label=f"{name}, {len(running)} steps")
left.set(xlabel="step", title="used share of the reserved slots, %", ylim=(0, 105))
right.set(xlabel="step", title="requests that run", ylim=(0, 36))
left.legend(loc="center")
right.legend(loc="upper right");

# %%
viz.answer("04.6", max(m3[1]))

# %% [markdown]
# ## Old numbers in a reused block
#
# A block is handed on with the K/V that its last owner left in it. So attention must read the slots of its own sequence and no others:

# %%
viz.source(TorchNaiveBackend.forward)

# %% [markdown]
# We put a sequence of 10 tokens into the blocks 5, 2 and 7 and fill **all slots that do not belong to the sequence** with NaN, also the two empty
# slots at the end of block 7. Then the same sequence goes into the blocks 9, 1 and 3. The result is the same, without a NaN, because attention reads
# 10 slots. Could it not read whole blocks, which is simpler, and give the two empty slots the weight 0?

# %%
viz.ask("04.7")

# %%
backend = TorchNaiveBackend(AttentionSpec(4, 2, 8, torch.float32, torch.device("cpu"), BLOCK_SIZE))
generator = torch.Generator().manual_seed(0)
key, value = torch.randn(2, 10, 2, 8, generator=generator)  # each [seq_len, num_kv_heads, head_size]
query = torch.randn(10, 4, 8, generator=generator)  # [seq_len, num_heads, head_size]


def attend(filling, block_ids):
    """Attention over a cache in which all slots that do not belong to the sequence hold `filling`."""
    cache = torch.full(backend.kv_cache_shape(10), filling)
    metadata = AttentionMetadata.single_sequence(10, block_ids, BLOCK_SIZE)
    backend.prepare(metadata)
    backend.write(key, value, cache, metadata)
    return backend.forward(query, cache, metadata)


nan = float("nan")
clean, poisoned, elsewhere = attend(0.0, [5, 2, 7]), attend(nan, [5, 2, 7]), attend(nan, [9, 1, 3])
whole_value = torch.cat([value, torch.full((2, 2, 8), nan)])  # [12 slots, num_kv_heads, head_size]
weight = torch.cat([torch.full((10,), 0.1), torch.zeros(2)])  # [12 slots]: the two empty ones weigh nothing
whole_block = (weight[:, None, None] * whole_value).sum(dim=0)  # [num_kv_heads, head_size]
print(f"only the sequence's slots are read: {int(poisoned.isnan().sum())} of {poisoned.numel()} numbers are NaN")
print(f"other blocks: {int((poisoned != elsewhere).sum())} numbers change")
print(f"whole blocks, weight 0 for the empty slots: {int(whole_block.isnan().sum())} of {whole_block.numel()} numbers are NaN")

# %%
viz.answer("04.7", bool(whole_block.isnan().any()))

# %% [markdown]
# Next: write the real thing. `folovllm learn m3` puts the exercises into your folder: the slot mapping, the block pool, `allocate_slots` and the gather.
#
# ## Is it all true?
#
# The last cell checks what this notebook claims.

# %%
if viz.as_delivered("04", globals()):
    for run in (steps, tight):
        for name, example in EXAMPLES.items():
            tokens = [token for step in run for token in step.sampled.get(name, [])]
            assert tokens == list(example.answer_token_ids[: example.max_tokens]), "the tokens depend on the blocks"
    assert sorted(free_after[5]) == list(range(1, 10)), "a block was lost, or the null block was handed out"
    assert tight[3].waiting == ["c"] and tight[4].blocks["c"] == [2, 1, 5] and tight[6].blocks["c"] == [6, 4, 3, 5]
    assert list(share.values()) == sorted(share.values()) and share[16] < 5 < 80 < share[2048]
    assert max(m2[1]) == NUM_LONG_BLOCKS and max(m3[1]) >= 3 * NUM_LONG_BLOCKS
    assert np.mean(m3[0]) > 90 > 40 > np.mean(m2[0])
    assert not poisoned.isnan().any() and torch.equal(clean, poisoned) and torch.equal(poisoned, elsewhere)
    assert whole_block.isnan().all()
    print(f"all true: {share[16]:.1f} % unused in blocks of 16, {share[2048]:.1f} % in one block of 2,048 for each request")
