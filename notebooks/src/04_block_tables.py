# %% [markdown]
# # 04 · Block tables, and where the memory goes
#
# A request's keys and values must lie somewhere, and nobody knows how long the answer will be. Reserve room for the longest
# answer possible, and most of it stays empty; that was the state of the art until 2023. vLLM's idea is the one operating
# systems had: cut the memory into small **blocks**, give a request one more when it needs it, and keep a **table** of which
# are whose. Here the real block pool does it, and we count every slot.
#
# *10 minutes. To read with it: `docs/learn/03_paged_kv_cache.md` and `folovllm/core/kv_cache_manager.py`.*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import json
import random
import sys
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

import torch
from matplotlib import pyplot as plt

from folovllm import SamplingParams, viz
from folovllm.attention.backend import AttentionMetadata, AttentionSpec
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.benchmarks.workloads import make_workload
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.hf_config import parse_hf_config
from folovllm.request import Request

torch.set_num_threads(1)
viz.style()
arch = parse_hf_config(json.load(open(ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json")))


def make_engine(preset="m3", **args):
    return EngineCore(EngineConfig.from_args(preset=preset, **args).resolve(arch, "cpu"), FakeExecutor())


def add(core, name, prompt_len, output_len):
    prompt = [(31 * sum(map(ord, name)) + 7 * i) % 1000 for i in range(prompt_len)]
    core.add_request(Request(name, prompt, SamplingParams(max_tokens=output_len, ignore_eos=True)))
    return fake_tokens(prompt, output_len)


# %% [markdown]
# ## What you can turn

# %%
BLOCK_SIZE = 4
NUM_BLOCKS = 24  # with the null block, number 0, which pads tables and belongs to nobody
REQUESTS = {"a": (9, 12), "b": (3, 5), "c": (14, 4)}  # name: (prompt tokens, output tokens)
LOOK_AFTER = (1, 4, 6)  # steps after which we look at the pool
BLOCK_SIZES = (1, 4, 16, 64, 256)

# %% [markdown]
# ## Logical and physical
#
# Token 7 of request a is in *logical* block 7 // 4 = 1, at offset 7 % 4 = 3. The table says which *physical* block that is;
# `slot = table[position // block_size] * block_size + position % block_size`. Below each cell is a physical block; "5 = a1"
# reads: physical block 5 is a's logical block 1. Full squares hold K/V, hatched ones are reserved and still empty.

# %%
core = make_engine(block_size=BLOCK_SIZE, num_kv_blocks=NUM_BLOCKS, max_model_len=64)
colours = viz.colours_of(REQUESTS)
expected = {name: add(core, name, *lengths) for name, lengths in REQUESTS.items()}
got = {name: [] for name in REQUESTS}
manager = core.scheduler.kv_cache_manager
pool = manager.block_pool


def free_list():
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


tables_seen, free_seen = [], [free_list()]
figure, axes = plt.subplots(len(LOOK_AFTER), 1, figsize=(9, 3.2 * len(LOOK_AFTER)), layout="constrained")
for step in range(1, max(LOOK_AFTER) + 1):
    for output in core.step():
        got[output.request_id] += output.new_token_ids
    if step in LOOK_AFTER:
        tables = {request.request_id: manager.get_block_ids(request.request_id)[0] for request in core.scheduler.running}
        lengths = {request.request_id: request.num_computed_tokens for request in core.scheduler.running}
        ax = axes[LOOK_AFTER.index(step)]
        viz.block_map(ax, tables, lengths, NUM_BLOCKS, BLOCK_SIZE, colours)
        ax.set_title(f"after step {step}: " + ", ".join(f"{name} {ids}" for name, ids in tables.items()), loc="left")
        tables_seen.append(tables)
        free_seen.append(free_list())

# %%
viz.predict(
    "After step 1, which slot holds token 7 of request a?", None, tables_seen[0]["a"][7 // 4] * 4 + 7 % 4,
    f"Its table is {tables_seen[0]['a']}: logical block 1 is physical block {tables_seen[0]['a'][1]}, offset 3.",
)  # fmt: skip

# %% [markdown]
# ## The free list
#
# c has finished after step 4 and gave its blocks back: in reverse, and to the *head* of the free queue, so they are the next
# to be used. (A block that prefix caching could use again would go to the tail. That is M6.)

# %%
viz.table(
    ["after step", "head of the free queue (next to be used first)", "free"],
    [[step, " ".join(map(str, ids[:10])) + " ...", len(ids)] for step, ids in zip((0, *LOOK_AFTER), free_seen)],
)

# %%
while core.has_unfinished_requests():
    for output in core.step():
        got[output.request_id] += output.new_token_ids
viz.predict(
    "When all have finished, are the free blocks in the order of their numbers again?", ["yes", "no"],
    "yes" if free_list() == sorted(free_list()) else "no",
    "The pool does not sort; physical numbers mean nothing, and the tables make any order right.",
)  # fmt: skip

# %% [markdown]
# ## What is wasted
#
# With blocks of B tokens, a request wastes only the empty end of its last block: between 0 and B - 1 slots, (B - 1) / 2 on
# average. "No fragmentation", as is often said, is not true; *external* fragmentation is gone, and the internal kind is
# bounded by the block. With one page per request (B = max_model_len, M2's cache) it is everything behind the last token.

# %%
workload = make_workload("A", 49152).requests
lengths = [len(r.prompt_token_ids) + r.output_len - 1 for r in workload]  # the last token is never computed


def wasted(block_size):
    """Reserved and unused slots of each finished request of workload A."""
    return [-length % block_size for length in lengths]


sizes = [*BLOCK_SIZES, 2048]
shares = [100 * sum(wasted(b)) / (sum(lengths) + sum(wasted(b))) for b in sizes]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
left.bar(range(len(sizes)), shares, color=[viz.PALETTE[0]] * len(BLOCK_SIZES) + [viz.PALETTE[1]])
left.set_xticks(range(len(sizes)), [*map(str, BLOCK_SIZES), "2048\n(one page)"])
left.set(xlabel="block size", ylabel="% of reserved slots unused", title="workload A, at the end of each request")
for place, share in enumerate(shares):
    left.text(place, share + 1, f"{share:.1f}", ha="center", size=8)
right.plot(BLOCK_SIZES, [sum(wasted(b)) / len(lengths) for b in BLOCK_SIZES], "o-", color=viz.PALETTE[0], label="measured")
right.plot(BLOCK_SIZES, [(b - 1) / 2 for b in BLOCK_SIZES], "--", color="#777777", label="(B - 1) / 2")
right.set(xscale="log", yscale="symlog", xlabel="block size", ylabel="unused slots per request", title="the last block")
right.set_xticks(BLOCK_SIZES, BLOCK_SIZES)
right.minorticks_off()
right.legend();

# %% [markdown]
# ## The same bytes, more requests
#
# Eight pages of 2,048 tokens are 1,024 blocks of 16. Same memory, same scheduler, same requests:

# %%
PAGES = 2 if FAST else 8


def utilisation(preset, blocks):
    """Used and reserved slots and running requests after every step of workload A."""
    core = make_engine(preset, max_model_len=2048, num_kv_blocks=blocks + 1)
    for i, request in enumerate(workload):
        add(core, f"r{i}", len(request.prompt_token_ids), request.output_len)
    curve = []
    while core.has_unfinished_requests():
        scheduled = core.scheduler.schedule()
        stats = core.stats()
        curve.append((stats.num_used_slots / stats.num_reserved_slots, stats.num_running))
        core.scheduler.update_from_output(scheduled, core.executor.sample(core.executor.execute(scheduled)))
    return curve


m2, m3 = utilisation("m2", PAGES), utilisation("m3", PAGES * 128)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for curve, name, colour in ((m2, "m2: one page each", viz.PALETTE[1]), (m3, "m3: blocks of 16", viz.PALETTE[0])):
    left.plot([100 * used for used, _ in curve], color=colour, label=name)
    right.plot([running for _, running in curve], color=colour, label=f"{name}: {len(curve)} steps")
left.set(xlabel="step", ylabel="% of reserved slots used", ylim=(0, 103))
right.set(xlabel="step", ylabel="requests running", ylim=(0, None))
left.legend(loc="center right")
right.legend();

# %%
viz.predict(
    f"{PAGES} pages let m2 run {PAGES} requests at once. How many does m3 run at its busiest?",
    None, max(running for _, running in m3), "Up to the number of requests there are: workload A has 32.",
)  # fmt: skip

# %% [markdown]
# ## Poison
#
# A block is handed on with whatever its last owner left in it. So attention must read the slots of its own sequence and not
# one more. To be sure, fill everything that is nobody's with NaN: a single wrong read would make the result NaN.

# %%
spec = AttentionSpec(4, 2, 8, torch.float32, torch.device("cpu"), BLOCK_SIZE)
backend = TorchNaiveBackend(spec)
table, length = [5, 2, 7], 10  # 10 tokens in physical blocks 5, 2 and the first half of 7
generator = torch.Generator().manual_seed(0)
key, value = torch.randn(2, length, 2, 8, generator=generator)  # each [length, num_kv_heads, head_size]
query = torch.randn(length, 4, 8, generator=generator)


def attend(filling, table):
    """Attention over a cache whose other slots all hold `filling`."""
    cache = torch.full(backend.kv_cache_shape(NUM_BLOCKS), filling)
    slots = torch.tensor([table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)])
    metadata = AttentionMetadata([0, length], [length], torch.tensor([table], dtype=torch.int32), slots, BLOCK_SIZE)
    backend.prepare(metadata)
    backend.write(key, value, cache, metadata)
    return backend.forward(query, cache, metadata)


clean, poisoned, elsewhere = attend(0.0, table), attend(float("nan"), table), attend(float("nan"), [9, 1, 3])
print("NaN in the result:", bool(poisoned.isnan().any()), "| other blocks, other result:", not torch.equal(poisoned, elsewhere))

# %% [markdown]
# ## Is it all true?

# %%
assert got == expected, "the tokens depend on the blocks"
assert len(free_list()) == NUM_BLOCKS - 1 and 0 not in free_list(), "a block was lost, or the null block given away"
assert not set(tables_seen[0]["a"]) & set(tables_seen[0]["b"]), "two requests hold one block"
assert free_seen[0] == list(range(1, NUM_BLOCKS))
assert all(waste < b for b in sizes for waste in wasted(b)) and shares == sorted(shares)
assert shares[BLOCK_SIZES.index(16)] < 10 < 60 < shares[-1]
assert max(running for _, running in m2) == PAGES and max(running for _, running in m3) >= 3 * PAGES
assert sum(used for used, _ in m3) / len(m3) > 0.9 and sum(used for used, _ in m2) / len(m2) < 0.4
assert not poisoned.isnan().any() and torch.equal(clean, poisoned) and torch.equal(poisoned, elsewhere)
print(f"all true: {shares[BLOCK_SIZES.index(16)]:.1f} % unused in blocks of 16, {shares[-1]:.1f} % in pages of 2,048")
