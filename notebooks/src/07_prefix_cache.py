# %% [markdown]
# # 07 · The prefix cache
#
# Many prompts begin alike: with the same system prompt, the same examples, or everything that was said so far in a chat.
# The K and V of such a beginning need to be computed only once, if the engine remembers which block holds which prefix.
# In this notebook the real scheduler and the real KV cache run on a model without weights. You chain hashes, count hits,
# and see which block is evicted. At the end a small real model answers with and without the cache.
#
# *30 minutes. Read [learn/06](../docs/learn/06_prefix_caching.md) up to its section on eviction first. **Predict** asks before
# an experiment, and **Answer** follows it; `viz.ask("07.1", guess=9)` has your guess judged. Next: [08](08_gptq.ipynb).*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import contextlib
import hashlib
import io
import random
import sys
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from folovllm import SamplingParams, viz
from folovllm.core.block_hash import BlockHasher, get_hash_function, root_hash
from folovllm.core.block_pool import BlockPool
from folovllm.core.prefix_index import HashPrefixIndex
from folovllm.learn.three_requests import EXAMPLES, PIECES, example_core, example_request, run_example, text_of
from folovllm.learn.toy_engine import block_ids, drive, make_core, make_request

viz.style()

# %% [markdown]
# ## What you can change

# %%
BLOCK_SIZE = 4
POOL = 6  # usable blocks, where requests are served one after another (at least four blocks of 4)
SERVICES, SYSTEM_PROMPT, QUESTION = 6, 96, 12  # services, and the tokens of each one's system prompt and questions
COLOURS = viz.colours_of("abc")

# %% [markdown]
# ## c begins like a
#
# The three requests of the learning pages: a is "The capital of France is", b is "Once upon a time", and c continues a's
# conversation. c arrives before step 2, and at most 6 tokens are computed per step.

# %%
viz.ask("07.1", BLOCK_SIZE=BLOCK_SIZE)

# %%
NUM_BLOCKS = max(9, -(-36 // BLOCK_SIZE))  # usable ones
ENGINE = {"block_size": BLOCK_SIZE, "num_kv_blocks": NUM_BLOCKS + 1, "enable_chunked_prefill": True, "max_num_batched_tokens": 6}
runs = {caching: list(run_example(example_core(**ENGINE, enable_prefix_caching=caching))) for caching in (False, True)}
computed = {caching: sum(step.scheduled.get("c", 0) for step in steps) for caching, steps in runs.items()}

# %%
for caching, steps in runs.items():
    print("prefix caching", "on" if caching else "off")
    for step in steps[2:5]:
        print("  ", step)

# %%
viz.answer("07.1", computed[True])

# %% [markdown]
# The picture shows the pool after step 2. A filled slot holds the K and V of the token in it. Look at block 1 in both pictures.

# %%
def piece(token_id):
    return PIECES[token_id].replace("\n", "\\n").strip(" ")


def draw_slots(ax, step, num_blocks=NUM_BLOCKS):
    """All usable blocks and their slots; a shared block has the colours of both requests."""
    for block in range(1, num_blocks + 1):
        holders = [name for name, table in step.blocks.items() if block in table]
        ax.text(block - 0.54, 0.25, f"block {block}" + (f" ({', '.join(holders)})" if holders else ""), ha="center", size=8)
        for offset in range(BLOCK_SIZE):
            text = ""
            for i, name in enumerate(holders or [None]):
                width = 0.92 / max(len(holders), 1)
                face, edge = viz.NOBODY, "white"
                if name:
                    tokens = EXAMPLES[name].prompt_token_ids + EXAMPLES[name].answer_token_ids
                    position = step.blocks[name].index(block) * BLOCK_SIZE + offset
                    is_full = position < step.start[name] + step.scheduled[name]
                    face, edge = COLOURS[name] if is_full else "white", COLOURS[name]
                    text = piece(tokens[position]) if is_full else ""
                ax.add_patch(Rectangle((block - 1 + i * width, 0.4 + offset), width, 0.92, fc=face, ec=edge))
            ink = "white" if holders and holders[-1] in "ac" else viz.INK
            ax.text(block - 0.54, 0.88 + offset, text, ha="center", va="center", size=8, color=ink)
    ax.set(xlim=(0, num_blocks), ylim=(BLOCK_SIZE + 0.5, 0))
    ax.axis("off")


figure, axes = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, sharey=True)
for ax, (caching, steps) in zip(axes, runs.items()):
    draw_slots(ax, steps[2])
    ax.set_title(f"prefix caching {'on: c shares block 1 with a' if caching else 'off: c computes the same tokens again'}")

# %% [markdown]
# ## A hash for every full block
#
# The hash of a block is made of the hash of the block before it and of the block's own tokens. A request may also have a *salt*
# (`cache_salt`), a text that goes into the hash of its first block: only requests with the same salt share blocks.

# %%
likes, hates = [1, 2, 3, 4] + [9] * 7, [1, 2, 3, 5] + [9] * 7

# %%
viz.ask("07.2", likes=likes, hates=hates)

# %%
sha256 = get_hash_function("sha256")
ROOT_HASH = root_hash(0, sha256)


def hashes_of(tokens, salt=None, block_size=BLOCK_SIZE):
    """The hashes that the engine gives to the full blocks of these tokens; the first six digits of each."""
    request = make_request("r", list(tokens), cache_salt=salt)
    request.attach_block_hasher(BlockHasher(block_size, sha256, ROOT_HASH))
    return [block_hash.hex()[:6] for block_hash in request.block_hashes]

# %%
rows = [[name, text_of(example.prompt_token_ids), " ".join(hashes_of(example.prompt_token_ids))] for name, example in EXAMPLES.items()]
rows += [["", str(likes), " ".join(hashes_of(likes))], ["", str(hates), " ".join(hashes_of(hates))]]
rows += [["", f"{likes} with a salt", " ".join(hashes_of(likes, "me"))]]
viz.table(["", "prompt", "hashes of the full blocks"], rows)

# %%
viz.answer("07.2", hashes_of(likes)[1] == hashes_of(hates)[1])

# %% [markdown]
# ### Your turn: chain the hashes
#
# Write the chain yourself. `ROOT_HASH` is the parent of the first block. A token is packed as
# `token.to_bytes(4, "little")`, and the hash function is `hashlib.sha256(...).digest()`. Return the first six hex digits of
# each hash, as `hashes_of` does.

# %%
def my_hashes(tokens, block_size):
    """The hashes of the full blocks, six hex digits each."""

# %%
HASHED = [(likes, 4), (hates, 4), (likes, 2), ([7, 8], 4)]
viz.your_turn("07.t1", my_hashes, [((tokens, size), hashes_of(tokens, block_size=size)) for tokens, size in HASHED])

# %% [markdown]
# The engine's version. `packed` holds the new tokens, 4 bytes each, and `extra_keys` is where the salt comes in.

# %%
viz.source(BlockHasher._add_blocks)

# %% [markdown]
# ## Looking up
#
# A full block is *published*: it is entered into an index by its hash. The lookup walks along the request's own hashes, and ends
# at the first that is not in the index:

# %%
viz.source(HashPrefixIndex.match)

# %%
viz.ask("07.3")

# %%
def serve(core, request):
    """Runs one request to its end. Returns its block table in the last step."""
    core.add_request(request)
    table = []
    while core.has_unfinished_requests():
        step = core.scheduler.schedule()
        table = block_ids(core, request.request_id)
        core.scheduler.update_from_output(step, core.executor.sample(core.executor.execute(step)))
    return table


def hit_of(prompt_len, num_equal, block_size):
    """How many tokens a prompt hits whose first `num_equal` tokens are those of a prompt that was served before."""
    core = make_core(block_size=block_size, num_kv_blocks=257, max_model_len=256, enable_prefix_caching=True)
    serve(core, make_request("first", list(range(100, 200)), max_tokens=1))
    prompt = list(range(100, 100 + num_equal)) + [0] * (prompt_len - num_equal)
    request = make_request("second", prompt, max_tokens=1)
    serve(core, request)
    return request.num_cached_tokens

# %%
viz.answer("07.3", hit_of(64, 64, 16))

# %% [markdown]
# ### Your turn: the length of a hit
#
# A prompt of `prompt_len` tokens begins with `num_equal` tokens that are cached, in blocks of `block_size`. How many
# tokens are hit? One line is enough. The cases below come from the engine.

# %%
def my_hit(prompt_len, num_equal, block_size):
    """The number of cached tokens that the request need not compute."""

# %%
CASES = [(64, 64, 16), (65, 64, 16), (12, 7, 4), (20, 8, 4), (5, 4, 1), (5, 5, 1), (9, 3, 4)]
viz.your_turn("07.t2", my_hit, [(case, hit_of(*case)) for case in CASES])

# %% [markdown]
# ## The free queue decides what is evicted
#
# When a request ends, its blocks become free, from its last block to its first. This method gives them their places:

# %%
viz.source(BlockPool.enqueue)

# %% [markdown]
# Blocks that hold cached text go to the tail, so the least recently used ones are evicted first (LRU). Now a, b and c run one after
# another in a pool of POOL blocks.

# %%
def tell(names, num_blocks=max(POOL, -(-16 // BLOCK_SIZE))):
    """Serves the named requests one by one. Returns (name, tokens hit, free queue, what its cached blocks hold) for each."""
    core = example_core(block_size=BLOCK_SIZE, num_kv_blocks=num_blocks + 1, enable_prefix_caching=True)
    pool, holds, story = core.scheduler.kv_cache_manager.block_pool, {}, []
    for name in names:
        request = example_request(name)
        table = serve(core, request)
        holds |= {b: (name, i) for i, b in enumerate(table) if i >= request.num_cached_tokens // BLOCK_SIZE}
        queue = pool.free_block_queue.get_all_free_blocks()
        cached = {block.block_id: holds[block.block_id] for block in queue if block.block_hash is not None}
        story.append((name, request.num_cached_tokens, [block.block_id for block in queue], cached))
    return story


after_a, after_b = tell("ab")

# %%
viz.ask("07.4", queue=after_b[2])

# %%
def draw_queue(ax, story):
    for y, (name, hit, queue, cached) in enumerate(story):
        ax.text(-0.1, y, f"after {name}, which hit {hit}", ha="right", va="center")
        for x, block in enumerate(queue):
            owner, index = cached.get(block, (None, 0))
            colour = COLOURS[owner] if owner else viz.NOBODY
            ax.add_patch(Rectangle((x, y - 0.42), 0.94, 0.84, fc=colour, ec="white"))
            tokens = EXAMPLES[owner].prompt_token_ids + EXAMPLES[owner].answer_token_ids if owner else ()
            words = [piece(token) for token in tokens[BLOCK_SIZE * index : BLOCK_SIZE * (index + 1)]]
            label = f"block {block}" + (f" ({owner})\n{' '.join(words[:2])}\n{' '.join(words[2:])}" if owner else "")
            ax.text(x + 0.47, y, label, ha="center", va="center", size=8, color="white" if owner in ("a", "c") else viz.INK)
    ax.text(0.47, -0.6, "head: handed out next", ha="center", size=8)
    ax.text(len(story[0][2]) - 0.53, -0.6, "tail: kept longest", ha="center", size=8)
    ax.set(xlim=(-1.3, len(story[0][2])), ylim=(len(story) - 0.5, -0.8))
    ax.axis("off")


story = tell("abc")
figure, ax = plt.subplots(figsize=(9, 3.4))
draw_queue(ax, story)

# %%
evicted = [block for block in after_b[3] if block not in story[2][3]]
viz.answer("07.4", evicted)

# %% [markdown]
# ### Your turn: the queue after c and then a
#
# Start again with an empty pool of six blocks. First c runs to its end (12 prompt tokens and 2 answer tokens; the last one
# is never computed), then a (5 prompt tokens, 4 answer tokens). Write down the free queue, head first. If you get stuck, draw
# the row after c first: which of its four blocks are full?

# %%
my_queue = None  # for example [3, 4, 5, 6, 2, 1]

# %%
viz.your_turn("07.t3", my_queue, tell("ca")[-1][2])

# %% [markdown]
# ## Hash chain, trie, and hits inside a block
#
# After a has ended, its second block holds " is Paris.\n". The second block of c is " is Paris. The". With
# `partial_block_hits` the engine copies the block and uses the three tokens that are equal. The *trie* is another index: a tree in
# which each child is the next block of a text. It finds the same blocks without hashes.

# %%
viz.ask("07.5")

# %%
ways = {
    "off": {"enable_prefix_caching": False},
    "hash chain": {},
    "trie": {"prefix_index": "trie"},
    "hash chain, partial hits": {"partial_block_hits": True},
    "trie, partial hits": {"prefix_index": "trie", "partial_block_hits": True},
}
hits = {}
for way, switches in ways.items():
    core = example_core(**{"num_kv_blocks": 20, "enable_prefix_caching": True} | switches)
    hits[way] = []
    for name in "acbac":
        request = example_request(name)
        serve(core, request)
        hits[way].append(request.num_cached_tokens)

# %%
viz.table(["tokens hit", "a", "then c", "then b", "a again", "c again"], [[way, *row] for way, row in hits.items()])

# %%
viz.answer("07.5", hits["hash chain, partial hits"][-1])

# %% [markdown]
# (a has 5 prompt tokens, and the last one must be computed, so a hits at most 4.)
#
# ## How large must the pool be?
#
# Several services share the engine, each with a system prompt of its own. Their questions come in random order, or in turn.

# %%
viz.ask("07.6", SERVICES=SERVICES, room=max(1, SERVICES - 2))

# %%
def hit_rate(usable_blocks, order, index="hash"):
    core = make_core(
        block_size=BLOCK_SIZE, num_kv_blocks=usable_blocks + 1, max_model_len=usable_blocks * BLOCK_SIZE,
        enable_prefix_caching=True, prefix_index=index,
    )  # fmt: skip
    for i, service in enumerate(order):
        system = [100 * service + k for k in range(SYSTEM_PROMPT)]
        serve(core, make_request(f"r{i}", system + [(7 * i + k) % 900 + 50 for k in range(QUESTION)], max_tokens=1))
    stats = core.stats()
    return stats.prefix_cache_hits / stats.prefix_cache_queries


rounds = 6 if FAST else 15
in_turn = list(range(SERVICES)) * rounds
at_random = random.Random(0).choices(range(SERVICES), k=len(in_turn))
per_request = -(-(SYSTEM_PROMPT + QUESTION + 1) // BLOCK_SIZE)
sizes = [per_request * n // 2 for n in range(2, 2 * SERVICES + 4)]
rates = {order: [hit_rate(size, services) for size in sizes] for order, services in (("in turn", in_turn), ("at random", at_random))}

# %%
figure, ax = plt.subplots(figsize=(9, 3))
for (name, values), colour, at in zip(rates.items(), (viz.PALETTE[5], viz.PALETTE[0]), (9, 5)):
    ax.plot([size / per_request for size in sizes], values, "o-", ms=4, color=colour)
    at = min(at, len(sizes) - 1)
    ax.annotate(name, (sizes[at] / per_request, values[at]), (6, -14), textcoords="offset points", color=colour)
limit = SYSTEM_PROMPT / (SYSTEM_PROMPT + QUESTION)
ax.axhline(limit, color=viz.INK, lw=0.8, ls=":")
ax.text(1, limit + 0.02, "all of the system prompt", size=8)
ax.set(xlabel="size of the pool, in requests that fit", ylabel="share of the tokens that is hit", ylim=(0, 1.05))
ax.set_title(f"{SERVICES} services, {len(in_turn)} requests");

# %%
small = rates["in turn"][sizes.index(per_request * max(1, SERVICES - 2))]
viz.answer("07.6", small)

# %% [markdown]
# The curves end below the dotted line, because the first request of each service finds nothing: 84 of 90 requests hit 96 of their
# 108 tokens, 0.83. With room for five of the six services in turn, 0.17 is hit: the last block of each request is not full, holds
# nothing that can be hit, and is used again first. So not all of the oldest request is evicted, and its first blocks are left.
#
# ## What does the size of a block cost?
#
# A hit ends at a whole block. 40 prompts share between 20 and 200 tokens with a prompt that was served before.

# %%
viz.ask("07.7")

# %%
block_sizes = [1, 2, 4, 8, 16, 32, 64]


def share_hit(block_size, **switches):
    core = make_core(
        block_size=block_size, num_kv_blocks=4096 // block_size + 1, max_model_len=512, enable_prefix_caching=True, **switches
    )
    rng = random.Random(3)
    base = [rng.randrange(900) for _ in range(200)]
    serve(core, make_request("base", base, max_tokens=80))
    lengths = [rng.randint(20, 200) for _ in range(10 if FAST else 40)]
    got = 0
    for i, n in enumerate(lengths):
        request = make_request(f"r{i}", [*base[:n], 900 + i, 5, 6], max_tokens=1)
        serve(core, request)
        got += request.num_cached_tokens
    return got / sum(lengths)


whole = [share_hit(size) for size in block_sizes]
partial = [share_hit(size, partial_block_hits=True) for size in block_sizes]

# %%
figure, ax = plt.subplots(figsize=(9, 2.8))
ax.plot(block_sizes, whole, "o-", color=viz.PALETTE[0])
ax.plot(block_sizes, partial, "s--", color=viz.PALETTE[5])
ax.annotate("whole blocks", (32, whole[5]), (-75, -12), textcoords="offset points", color=viz.PALETTE[0])
ax.annotate("with partial hits", (8, partial[3]), (0, 8), textcoords="offset points", color=viz.PALETTE[5])
ax.set_xscale("log", base=2)
ax.set(xlabel="block size", ylabel="share that is hit", ylim=(0, 1.15), xticks=block_sizes)
ax.set_xticklabels(block_sizes);

# %%
viz.answer("07.7", whole[block_sizes.index(16)])

# %% [markdown]
# ## A real model: do the tokens change?
#
# A tiny Llama with random weights, in fp32. Five prompts run twice, so the second time most of each prompt is cached.

# %%
import torch

from folovllm import LLM
from folovllm.learn.defaults import tiny_model

torch.set_num_threads(1)
base = random.Random(1).choices(range(3, 250), k=40)
prompts = [{"prompt_token_ids": [*base[:n], 3 + n]} for n in (40, 40, 33, 20, 7)]
params = [SamplingParams(max_tokens=10, ignore_eos=True, temperature=i % 2, seed=i) for i in range(5)]
tokens, cached = {}, {}
with contextlib.redirect_stderr(io.StringIO()):
    for way, switches in ways.items():
        llm = LLM(
            tiny_model(), skip_tokenizer_init=True, preset="m6", dtype="float32", max_model_len=64, block_size=4, **switches
        )
        for time in ("first time", "second time"):
            answers = llm.generate(prompts, params, use_tqdm=False)
            tokens[way, time] = [answer.outputs[0].token_ids for answer in answers]
            cached[way, time] = [answer.num_cached_tokens for answer in answers]
viz.table(
    ["", "", "cached tokens of each prompt", "same tokens as without the cache"],
    [[way, time, str(row), "yes" if tokens[way, time] == tokens["off", "first time"] else "no"]
     for (way, time), row in cached.items()],
)  # fmt: skip

# %% [markdown]
# The second prompt is cached already the first time: it equals the first one and is admitted in the same step. A block is
# published when it is scheduled, and all K and V of a step are written before any are read. With partial hits, the third prompt hits 33
# tokens the second time, and 32 the first time: a partial hit copies a block before the step, and then its K and V must be there.
#
# ## Is it all true?

# %%
if viz.as_delivered("07", globals()):
    assert computed == {False: 13, True: 9} and runs[True][2].blocks["c"][0] == runs[True][2].blocks["a"][0]
    assert hashes_of(likes)[0] != hashes_of(hates)[0] and len(hashes_of(likes)) == len(likes) // BLOCK_SIZE
    assert hashes_of(EXAMPLES["a"].prompt_token_ids)[0] == hashes_of(EXAMPLES["c"].prompt_token_ids)[0]
    assert not set(hashes_of(likes)) & set(hashes_of(likes, "me"))
    by_hand = hashlib.sha256(ROOT_HASH + b"".join(token.to_bytes(4, "little") for token in likes[:4])).hexdigest()
    assert hashes_of(likes)[0] == by_hand[:6]
    assert [hit_of(*case) for case in CASES] == [48, 64, 4, 8, 4, 4, 0]
    assert [hit for _, hit, _, _ in story] == [0, 0, 4] and evicted == [2] and tell("aba")[-1][1] == 4
    assert hits["off"] == [0] * 5 and hits["hash chain"] == hits["trie"] == [0, 4, 0, 4, 8]
    assert hits["hash chain, partial hits"] == hits["trie, partial hits"] == [0, 7, 0, 4, 11]
    assert all(hit_rate(size, at_random[:30]) == hit_rate(size, at_random[:30], "trie") for size in sizes[::4])
    assert rates["in turn"][0] < 0.2 and rates["in turn"][-1] > 0.7
    assert whole[0] == partial[0] == 1.0 and whole == sorted(whole, reverse=True) and min(partial) > 0.9
    assert all(t == tokens["off", "first time"] for t in tokens.values()) and sum(cached["hash chain", "second time"]) > 0
    print("all true: the same tokens in", len(ways), "ways of looking")
