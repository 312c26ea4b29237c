# %% [markdown]
# # 07 · What was computed before: the prefix cache
#
# Many prompts begin alike: a system prompt, worked examples, the talk so far. Their K and V need not be computed again,
# if somebody remembers which block holds which prefix. Here the **real scheduler** runs with a model without weights:
# names are chained, hits counted, blocks thrown out. You turn the sizes. At the end a tiny real model shows that the
# tokens stay the same in fp32.
#
# *15 minutes. To read with it: `docs/learn/06_prefix_caching.md` and `folovllm/core/prefix_index.py`.*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import json
import random
import sys
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

from matplotlib import pyplot as plt

from folovllm import SamplingParams, viz
from folovllm.config import EngineConfig
from folovllm.core.block_hash import BlockHasher, get_hash_function, root_hash
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.hf_config import parse_hf_config
from folovllm.request import Request

viz.style()

# %% [markdown]
# ## What you can turn

# %%
BLOCK_SIZE = 4
USABLE_BLOCKS = 8
TENANTS, SYSTEM_PROMPT, QUESTION = 6, 96, 12  # several services, each with a system prompt; tokens

# %% [markdown]
# ## A name for every full block
#
# A block's name is the hash of its tokens and of the name of the block before it.

# %%
sha256 = get_hash_function("sha256")


def names(tokens, salt=None):
    request = Request("r", list(tokens), SamplingParams(), cache_salt=salt)
    request.attach_block_hasher(BlockHasher(BLOCK_SIZE, sha256, root_hash(0, sha256)))
    return [name.hex()[:6] for name in request.block_hashes]


likes, hates = [1, 2, 3, 4] + [9] * 7, [1, 2, 3, 5] + [9] * 7
viz.table(
    ["tokens", "names of full blocks"],
    [[str(likes), " ".join(names(likes))], [str(hates), " ".join(names(hates))],
     [f"{likes}, salted", " ".join(names(likes, "me"))]],
)  # fmt: skip

# %%
viz.predict(
    "The second block of both texts is 9 9 9 9. Has it the same name?", ["yes", "no"],
    "yes" if names(likes)[1] == names(hates)[1] else "no",
    "Its K and V depend on the token before it, so its name must, too. The third block is not full: it has no name.",
)  # fmt: skip

# %% [markdown]
# ## Hits, and the free queue
#
# Four requests, one after another. When a request ends its blocks become free: unnamed ones go to the head of the
# queue, named ones to the tail, the end of the text before its beginning. Colour: the block can still be hit.

# %%
arch = parse_hf_config(json.load(open(ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json")))


def make_core(usable_blocks, block_size=BLOCK_SIZE, **switches):
    config = EngineConfig.from_args(
        preset="m6", attention_backend="torch_naive", block_size=block_size, num_kv_blocks=usable_blocks + 1,
        max_model_len=min(usable_blocks * block_size, 8192), **switches,
    )  # fmt: skip
    return EngineCore(config.resolve(arch, "cpu"), FakeExecutor())


def serve(core, name, prompt, num_tokens=2, salt=None):
    """Run one request to its end; it, and its block table. A wrong hit would give wrong tokens."""
    request = Request(name, list(prompt), SamplingParams(max_tokens=num_tokens, ignore_eos=True), cache_salt=salt)
    core.add_request(request)
    table = []
    while core.has_unfinished_requests():
        step = core.scheduler.schedule()
        table = core.scheduler.kv_cache_manager.get_block_ids(name)[0]
        core.scheduler.update_from_output(step, core.executor.sample(core.executor.execute(step)))
    assert request.output_token_ids == fake_tokens(list(prompt), num_tokens)
    return request, table


a = list(range(100, 110))
story = {"a": a, "b": [*a[:8], 1, 2, 3], "c": list(range(200, 213)), "d": list(range(300, 313))}
colours = viz.colours_of(story)


def tell(usable_blocks, **switches):
    core = make_core(usable_blocks, **switches)
    pool, owner, rows = core.scheduler.kv_cache_manager.block_pool, {}, []
    for name, prompt in story.items():
        request, table = serve(core, name, prompt)
        owner |= {block: (name, i) for i, block in enumerate(table) if i >= request.num_cached_tokens // BLOCK_SIZE}
        queue = pool.free_block_queue.get_all_free_blocks()
        named = {block.block_id: owner[block.block_id] for block in queue if block.block_hash is not None}
        rows.append((name, request.num_cached_tokens, [block.block_id for block in queue], named))
    return core, rows


def draw_queue(ax, rows):
    for y, (name, hit, queue, named) in enumerate(rows):
        ax.text(-0.2, y, f"after {name}: {hit} hit", ha="right", va="center")
        for x, block in enumerate(queue):
            colour = colours[named[block][0]] if block in named else "white"
            ax.add_patch(plt.Rectangle((x, y - 0.4), 0.9, 0.8, fc=colour, ec="black", lw=0.6))
            label = f"{block}" + (f"\n{named[block][0]}, block {named[block][1]}" if block in named else "")
            ax.text(x + 0.45, y, label, ha="center", va="center", size=7)
    ax.set(xlim=(-2, len(rows[0][2])), ylim=(len(rows) - 0.5, -0.6))
    ax.axis("off")


core, rows = tell(USABLE_BLOCKS)
figure, ax = plt.subplots(figsize=(10, 2.8), layout="constrained")
draw_queue(ax, rows)

# %%
again, _ = serve(core, "a again", a)
viz.predict(
    "Now somebody asks a's prompt of 10 tokens again. How many of them are still there?", None,
    again.num_cached_tokens,
    "d needed four blocks and two were unnamed; of the named ones b's end and a's second block were nearest to the "
    "head. a's first block is left.",
)  # fmt: skip

# %% [markdown]
# ## Hash chain, trie, and hits inside a block
#
# Four prompts that begin alike, under every way of looking.

# %%
alike = [a, a, [*a[:6], 1, 2, 3, 4], [*a, 5]]
ways = {
    "off": {"enable_prefix_caching": False},
    "hash chain": {},
    "trie": {"prefix_index": "trie"},
    "hash chain, partial hits": {"partial_block_hits": True},
    "trie, partial hits": {"prefix_index": "trie", "partial_block_hits": True},
}
hits = {}
for way, switches in ways.items():
    core = make_core(8, **switches)
    hits[way] = [serve(core, f"r{i}", prompt, 3)[0].num_cached_tokens for i, prompt in enumerate(alike)]
viz.table(["", "first", "the same", "6 tokens alike", "one more"], [[way, *row] for way, row in hits.items()])

# %%
viz.predict(
    "The second prompt is known completely, 10 tokens. How many are hit in whole blocks of 4? How many with copies?",
    None, f"{hits['hash chain'][1]}, {hits['hash chain, partial hits'][1]}",
    "Two whole blocks are 8. A copy may take all but the last token: that is computed, since its logits are needed.",
)  # fmt: skip

# %% [markdown]
# ## How large must the pool be?
#
# Several services share the engine, each with its own system prompt; questions come in random order, or in the worst
# one: round and round. What share of the tokens is hit, as the pool grows?

# %%
def hit_rate(usable_blocks, order, index="hash"):
    core = make_core(usable_blocks, prefix_index=index)
    for i, tenant in enumerate(order):
        system = [(1000 * tenant + k) % 49000 for k in range(SYSTEM_PROMPT)]
        serve(core, f"r{i}", system + [(7919 * i + k) % 49000 for k in range(QUESTION)], 1)
    stats = core.stats()
    return stats.prefix_cache_hits / stats.prefix_cache_queries


rounds = 6 if FAST else 15
cyclic = list(range(TENANTS)) * rounds
shuffled = random.Random(0).choices(range(TENANTS), k=len(cyclic))
per_request = -(-(SYSTEM_PROMPT + QUESTION + 1) // BLOCK_SIZE)
sizes = [per_request * n // 2 for n in range(2, 2 * TENANTS + 4)]
rates = {
    "round and round": [hit_rate(size, cyclic) for size in sizes],
    "at random": [hit_rate(size, shuffled) for size in sizes],
}
figure, ax = plt.subplots(figsize=(10, 3), layout="constrained")
for name, values in rates.items():
    ax.plot([size / per_request for size in sizes], values, "o-", ms=4, label=name)
ax.axhline(SYSTEM_PROMPT / (SYSTEM_PROMPT + QUESTION), color="black", lw=0.6, ls=":")
ax.set(xlabel="pool, in requests", ylabel="tokens hit", ylim=(0, 1), title=f"{TENANTS} system prompts take turns")
ax.legend();

# %%
viz.predict(
    f"{TENANTS} services ask in turn, and the pool holds {TENANTS - 2} of their requests. What does LRU keep for them?",
    ["most of it", "about half", "next to nothing"],
    "next to nothing" if rates["round and round"][sizes.index(per_request * (TENANTS - 2))] < 0.25 else "about half",
    "The one who comes next is always the one who was there longest ago: exactly the one that was thrown out. "
    "Random order is kinder, and a pool that holds them all has no such edge.",
)  # fmt: skip

# %% [markdown]
# ## What does the size of a block cost?
#
# A hit ends at a whole block. The smaller the blocks, the more of a prefix is hit; a partial hit does not care.

# %%
block_sizes = [1, 2, 4, 8, 16, 32, 64]


def shared_by(block_size, **switches):
    core = make_core(4096 // block_size, block_size, **switches)
    rng = random.Random(3)
    base = [rng.randrange(49000) for _ in range(200)]
    serve(core, "base", base, 80)
    lengths = [rng.randint(20, 200) for _ in range(10 if FAST else 40)]
    got = [serve(core, f"r{i}", [*base[:n], 49000 + i, 5, 6], 1)[0].num_cached_tokens for i, n in enumerate(lengths)]
    return sum(got) / sum(lengths)


whole = [shared_by(size) for size in block_sizes]
copied = [shared_by(size, partial_block_hits=True) for size in block_sizes]
figure, ax = plt.subplots(figsize=(10, 2.8), layout="constrained")
ax.plot(block_sizes, whole, "o-", label="whole blocks")
ax.plot(block_sizes, copied, "s--", label="with partial hits")
ax.set_xscale("log", base=2)
ax.set(xlabel="block size", ylabel="share of the common tokens that is hit", ylim=(0, 1.05), xticks=block_sizes)
ax.set_xticklabels(block_sizes)
ax.legend();

# %% [markdown]
# ## The same with a real model: do the tokens change?

# %%
import contextlib
import io
import tempfile

import torch

from folovllm import LLM
from tests.tiny_models import make_tiny

torch.set_num_threads(1)
with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
    model = make_tiny("llama", Path(folder))
    base = random.Random(1).choices(range(3, 250), k=40)
    prompts = [{"prompt_token_ids": [*base[:n], 3 + n]} for n in (40, 40, 33, 20, 7)]
    params = [SamplingParams(max_tokens=10, ignore_eos=True, temperature=i % 2, seed=i) for i in range(5)]
    tokens, cached = {}, {}
    for way, switches in ways.items():
        llm = LLM(str(model), preset="m6", dtype="float32", max_model_len=64, block_size=4, **switches)
        for time in ("cold", "warm"):
            answers = llm.generate(prompts, params, use_tqdm=False)
            tokens[way, time] = [answer.outputs[0].token_ids for answer in answers]
            cached[way, time] = [answer.num_cached_tokens for answer in answers]
viz.table(
    ["", "", "cached tokens", "same tokens"],
    [[way, time, str(row), "yes" if tokens[way, time] == tokens["off", "cold"] else "no"]
     for (way, time), row in cached.items()],
)  # fmt: skip

# %% [markdown]
# ## Is it all true?

# %%
assert names(likes)[0] != names(hates)[0] and len(names(likes)) == len(likes) // BLOCK_SIZE
assert not set(names(likes)) & set(names(likes, "me"))
assert [hit for _, hit, _, _ in rows] == [0, 8, 0, 0] and again.num_cached_tokens == 4
assert hits["off"] == [0, 0, 0, 0] and hits["hash chain"] == hits["trie"] == [0, 8, 4, 8]
assert hits["hash chain, partial hits"] == hits["trie, partial hits"] == [0, 9, 6, 10]
assert all(hit_rate(size, shuffled[:30]) == hit_rate(size, shuffled[:30], "trie") for size in sizes[::4])
assert rates["round and round"][0] < 0.2 and rates["round and round"][-1] > 0.7
assert whole[0] == copied[0] == 1.0 and whole == sorted(whole, reverse=True) and min(copied) > 0.9
assert all(t == tokens["off", "cold"] for t in tokens.values()) and sum(cached["hash chain", "warm"]) > 0
print("all true: one set of tokens,", len(ways), "ways of looking")
