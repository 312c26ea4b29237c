# %% [markdown]
# # 05 · Attention in tiles
#
# Softmax wants to see a whole row of scores before it answers: first the maximum, then the sum, then a division. So the obvious
# attention writes the full matrix of scores, queries x keys, to memory, and reads it back, twice. FlashAttention never has
# that matrix: it looks at a tile, **corrects** what it believed before, and forgets the tile. Nothing is approximated. Here
# we take the correction apart, break it, count the memory, and cut the work in two other ways.
#
# *10 minutes. To read with it: `docs/learn/04_flash_attention.md` and `folovllm/attention/backends/torch_flash.py`.*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import contextlib
import io
import sys
import time
import warnings
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")  # where no C++ compiler is found, cpu_paged says so; below it is simply left out

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm import viz
from folovllm.attention.backend import AttentionMetadata, AttentionSpec, sequence_slots
from folovllm.attention.backends.torch_flash import TorchFlashBackend, group_queries, ungroup_queries
from folovllm.attention.selector import load_backend, refusal
from folovllm.csrc.build import load_ops

viz.style()
with contextlib.redirect_stderr(io.StringIO()):
    load_ops()  # the C++ kernels: built here if this machine has not got them yet, half a minute
CPU = torch.device("cpu")

# %% [markdown]
# ## What you can turn

# %%
SCORES = [1.0, 3.0, 2.0, 0.5, 5.0, 4.0, 1.5, 2.5, 3.5, 7.0, 0.0, 1.0]  # of one query, key by key
TILE = 3  # keys that are looked at together
RESCALE = True  # False: forget the correction
HEADS, KV_HEADS, SIZE, BLOCK = 9, 3, 64, 16  # SmolLM2-135M
LENGTHS = (128, 256, 512) if FAST else (128, 256, 512, 1024)  # prompts, for memory and time
PARTS = 4  # pieces that the keys of a decoding token are cut into
THREADS = 1  # for the clock at the end: with more, whatever else your machine does disturbs it
BACKENDS = ("torch_naive", "torch_sdpa", "torch_flash", "cpu_paged")
torch.set_num_threads(THREADS)

# %% [markdown]
# ## The matrix
#
# One layer's scores in fp32, beside what goes in and comes out (Q, K, V and the output in bf16):

# %%
rows = []
for length in (512, 2048, 8192, 32768):
    matrix = 4 * HEADS * length**2
    inputs = 2 * length * SIZE * (2 * HEADS + 2 * KV_HEADS)
    rows.append([length, round(inputs / 1e6, 1), round(matrix / 1e6, 1), round(matrix / inputs)])
viz.table(["tokens", "MB of Q, K, V, output", "MB of scores", "times as much"], rows)

# %%
viz.predict(
    "The scores are written, read by softmax, written again as weights and read again to meet V. For a prompt of 8,192 tokens: how many "
    "GB is that in all 30 layers?",
    [0.3, 9.7, 290, 7_300],
    min([0.3, 9.7, 290, 7_300], key=lambda x: abs(x - 30 * 4 * 4 * HEADS * 8192**2 / 1e9)),
    "4 passes of 2.4 GB in each of 30 layers, through a memory that moves a few tens of GB per second. Q, K, V "
    "and the output together would be 0.8 GB.",
)

# %% [markdown]
# ## A softmax that changes its mind
#
# Go through the keys once, a tile at a time, and carry three things: `m`, the largest score so far; `l`, the sum of
# `exp(score - m)`; and `O`, the sum of `exp(score - m) * v`. When a larger maximum comes, everything summed so far
# carries the wrong factor, but the *same* wrong factor: one multiplication by `exp(m_old - m_new)` mends it.

# %%
scores = torch.tensor(SCORES)  # [keys]
values = torch.linspace(-1, 1, len(SCORES)) ** 3 + 0.5  # [keys], one number per key, so that we can draw
exact = float((scores.softmax(0) * values).sum())


def online(tile, rescale=True):
    """What is known after each tile: (keys seen, m, l, O)."""
    m, l, O = -torch.inf, 0.0, 0.0  # noqa: E741 - the names of the paper
    known = []
    for first in range(0, len(scores), tile):
        s, v = scores[first : first + tile], values[first : first + tile]
        new_m = max(m, float(s.max()))
        p = torch.exp(s - new_m)
        correction = float(torch.exp(torch.tensor(m - new_m))) if rescale else 1.0
        l = l * correction + float(p.sum())  # noqa: E741
        O = O * correction + float((p * v).sum())
        m = new_m
        known.append((first + len(s), m, l, O))
    return known


path = online(TILE, RESCALE)
viz.table(["keys seen", "m", "l", "O", "O / l"], [[n, f"{m:g}", *(f"{x:.4f}" for x in (l, O, O / l))] for n, m, l, O in path])

# %%
first, second = path[0], path[1]
viz.predict(
    f"After tile 0 the maximum is {first[1]:g}; tile 1 brings a {second[1]:g}. By what are l and O of tile 0 multiplied?",
    [0.14, 0.5, 1.0, 7.39],
    round(float(torch.exp(torch.tensor(first[1] - second[1]))), 2),
    "exp(3 - 5). The old keys do not get less: they were measured against 3 and are now measured against 5.",
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
edges = range(0, len(SCORES) + 1, TILE)
left.bar(range(len(SCORES)), SCORES, color=[viz.PALETTE[(i // TILE) % 8] for i in range(len(SCORES))])
left.step([n - TILE - 0.5 for n, *_ in path] + [len(SCORES) - 0.5], [m for _, m, _, _ in path] + [path[-1][1]], where="post", color=viz.INK)
left.set(xlabel="key (colours are tiles)", ylabel="score", title="the line is m, the maximum so far")
for rescale, style, label in ((True, "o-", "with the correction"), (False, "x--", "without it")):
    known = online(TILE, rescale)
    right.plot([n for n, *_ in known], [O / l for _, _, l, O in known], style, label=label)
right.axhline(exact, color="#777777", lw=1, ls=":", label="softmax of the whole row")
right.set(xlabel="keys seen", ylabel="O / l", title="the answer so far")
right.legend();

# %% [markdown]
# Note that `O / l` is a right answer at *every* point: attention over the keys seen so far. That will be useful twice.
#
# ## The tiles, and the corner that is never computed
#
# Now many queries. A causal model lets token i see tokens 0 .. i, so tiles above the diagonal need not even be read. With a
# KV cache the new queries are the **last** positions of the sequence, so the diagonal ends in the *bottom right* corner.
# Below, the tiles that `torch_flash` really visits, written down while it runs (tiles shrunk to 4 x 4).


# %%
class Cached:
    """A backend, and one sequence of `length` tokens in its cache, in blocks that lie anywhere."""

    def __init__(self, backend, length, dtype=torch.float32, num_seqs=1, seed=0):
        backend = load_backend(backend) if isinstance(backend, str) else backend
        self.backend = backend(AttentionSpec(HEADS, KV_HEADS, SIZE, dtype, CPU, BLOCK))
        generator = torch.Generator().manual_seed(seed)
        each = -(-length // BLOCK)
        order = 1 + torch.randperm(num_seqs * each, generator=generator)
        self.table, self.length, self.num_seqs = order.view(num_seqs, each).int(), length, num_seqs
        self.key, self.value = torch.randn(2, num_seqs * length, KV_HEADS, SIZE, generator=generator).to(dtype)
        self.query = torch.randn(num_seqs * length, HEADS, SIZE, generator=generator).to(dtype)
        self.cache = torch.full(self.backend.kv_cache_shape(1 + num_seqs * each), float("nan"), dtype=dtype)
        self.backend.write(self.key, self.value, self.cache, self.step(length))

    def step(self, new):
        """The metadata of a step that computes the last `new` tokens of every sequence."""
        positions = torch.arange(self.length - new, self.length)
        slots = (self.table[:, positions // BLOCK].long() * BLOCK + positions % BLOCK).flatten()
        starts = [i * new for i in range(self.num_seqs + 1)]
        metadata = AttentionMetadata(starts, [self.length] * self.num_seqs, self.table, slots, BLOCK)
        self.backend.prepare(metadata)
        return metadata

    def attend(self, new):
        query = self.query.view(self.num_seqs, self.length, HEADS, SIZE)[:, self.length - new :].reshape(-1, HEADS, SIZE)
        return self.backend.forward(query, self.cache, self.step(new))


def visited(length, new, tile=4):
    """(first query, first key, keys, masked) of every tile that torch_flash computes."""
    seen = []

    class Noting(TorchFlashBackend):
        BLOCK_Q = BLOCK_KV = tile

        def mask_future(self, scores, first_key, position, num_rows):
            keys = scores.shape[-1]
            seen.append((position, num_rows, first_key, keys, first_key + keys - 1 > position))
            super().mask_future(scores, first_key, position, num_rows)

    Cached(Noting, length).attend(new)
    return seen


CASES = {"a prompt of 24": (24, 24), "10 new tokens after 14": (24, 10), "one new token after 23": (24, 1)}
tiles = {name: visited(*case) for name, case in CASES.items()}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="none")
for ax, (name, seen) in zip(axes, tiles.items()):
    length, new = CASES[name]
    ax.add_patch(Rectangle((0, length - new), length, new, fc=viz.NOBODY, ec="none"))
    for position, num_rows, key, keys, masked in seen:
        ax.add_patch(Rectangle((key, position), keys, num_rows, fc=viz.PALETTE[1 if masked else 4], ec="white", lw=1.5))
    ax.plot([length - new, length], [length - new, length], color=viz.INK, lw=1)
    ax.set(xlim=(0, length), ylim=(length, 0), xlabel="position of the key", ylabel="position of the query", title=name)
    ax.set_aspect("equal")
figure.suptitle("blue: every query sees every key. Orange: needs the mask. Grey: never computed", fontsize=9);

# %%
n = 24 // 4
computed = len(tiles["a prompt of 24"])
viz.predict(
    f"A long prompt in square tiles. About what share of all tiles is computed? (Here: of {n} x {n}.)",
    ["all", "three quarters", "a bit more than half", "a quarter"],
    "a bit more than half" if 0.5 < computed / n**2 < 0.65 else "all",
    f"{computed} of {n * n}: n (n + 1) / 2. Half of the arithmetic is saved too; torch_naive computes it and throws it away.",
)

# %% [markdown]
# ### The trap called is_causal
#
# Two new tokens on a sequence of four. PyTorch's `is_causal=True` puts the triangle into the *top left* corner, as if the two
# queries were tokens 0 and 1. Nothing crashes; the text merely gets strange as soon as a cache is used.

# %%
q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 4, 8), torch.eye(4, 8).view(1, 1, 4, 8)  # v shows the weights
trap = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0, :, :4]  # [2, 4]
mask = torch.ones(2, 4, dtype=torch.bool).tril(diagonal=4 - 2)
right_one = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0, 0, :, :4]  # [2, 4]
viz.table(
    ["query", "weights with is_causal=True", "weights wanted"],
    [[f"token {i + 2}", " ".join(f"{w:.2f}" for w in a), " ".join(f"{w:.2f}" for w in b)] for i, (a, b) in enumerate(zip(trap, right_one))],
)

# %% [markdown]
# ## The largest tensor
#
# A promise like "never builds the matrix" can be checked: a dispatch mode sees every tensor that any torch operator makes.


# %%
class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made while it is active. Views share memory and do not count."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None for r in func._schema.returns)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and not is_view:
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result


def largest(name, length):
    cached = Cached(name, length)
    metadata = cached.step(length)
    with LargestTensor() as mode:
        cached.backend.forward(cached.query, cached.cache, metadata)
    return mode.nbytes


PLAIN = ("torch_naive", "torch_flash")
memory = {name: [largest(name, length) for length in LENGTHS] for name in PLAIN}
_, ax = plt.subplots(figsize=(7, 3))
for name, sizes in memory.items():
    ax.plot(LENGTHS, [s / 1e6 for s in sizes], "o-", label=name)
ax.plot(LENGTHS, [2 * 4 * n * HEADS * SIZE / 1e6 for n in LENGTHS], ":", color="#777777", label="queries and output, for scale")
ax.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="MB", title="the largest tensor made in one layer")
ax.set_xticks(LENGTHS, LENGTHS)
ax.minorticks_off()
ax.legend();

# %% [markdown]
# ## Tiles and pages
#
# A tile of keys is looked up when it is its turn, so it may lie anywhere: the block table fits into the loop of tiles as if made for
# it. `attend_tiles` is that loop; it gets slots, not keys. Same sequence, other blocks:

# %%
cached = Cached("torch_flash", 200)
oracle = Cached("torch_naive", 200).attend(200)  # [200, heads, size]
by_slot = cached.backend.by_slot(cached.cache)  # [2, slots, kv_heads, size]
slots = sequence_slots(cached.table[0], 200, BLOCK)  # [200]
q = group_queries(cached.query * SIZE**-0.5, KV_HEADS)  # [kv_heads, group * 200, size]
out, lse = cached.backend.attend_tiles(q, by_slot, slots, position=0, num_rows=200)
paged = ungroup_queries(out, 200)
print("blocks", cached.table[0].tolist(), "| largest difference to torch_naive:", f"{(paged - oracle).abs().max():.1e}")

# %% [markdown]
# ## Split-KV: one query, many workers
#
# A decoding sequence has one query: a single row of tiles, which one worker walks from left to right while the others look on.
# But `O / l` was right at every point, so cut the *keys*: each worker attends to its part alone, and also says how much weight
# its part holds, `lse = log(sum of exp(score))`. The parts are merged with the shares `exp(lse_i - lse)`.

# %%
position = 199  # the last token decodes
one = group_queries(cached.query[-1:] * SIZE**-0.5, KV_HEADS)  # [kv_heads, group, size]
cuts = [round(i * 200 / PARTS) for i in range(PARTS + 1)]
parts = [cached.backend.attend_tiles(one, by_slot, slots[a:b], position, 1, first_key=a) for a, b in zip(cuts, cuts[1:])]
merged, total = cached.backend.merge_partials([o for o, _ in parts], [e for _, e in parts])
plain_mean = torch.stack([o for o, _ in parts]).mean(0)
shares = torch.stack([(e - total).exp()[0, 0] for _, e in parts])  # of KV head 0's first query head
wanted = group_queries(oracle[-1:], KV_HEADS)
viz.table(
    ["part", "keys", "share of the weight", "largest difference of this part alone"],
    [[i, f"{a} to {b - 1}", f"{float(s):.1%}", float((o - wanted).abs().max())] for i, (a, b, s, (o, _)) in enumerate(zip(cuts, cuts[1:], shares, parts))],
)

# %%
print(f"merged: {(merged - wanted).abs().max():.1e} off; the plain mean of the parts: {(plain_mean - wanted).abs().max():.2f} off")

# %% [markdown]
# ## The clock
#
# One layer, the backends that can run here, and two kinds of work: a whole prompt, and 8 sequences that decode one token
# each. Watch where the lines bend. For a prompt, naive pays for its matrix. In decoding there is hardly a matrix (one row
# per head), and tiles alone gain nothing: there the price is *gathering* K and V from the pages before use, and `cpu_paged`,
# which reads pages in place, is the one that stands out.

# %%
available = [name for name in BACKENDS if refusal(name, AttentionSpec(HEADS, KV_HEADS, SIZE, torch.float32, CPU, BLOCK)) is None]


def milliseconds(name, length, new, num_seqs):
    cached = Cached(name, length, num_seqs=num_seqs)
    query = cached.query[: num_seqs * new]
    metadata, times = cached.step(new), []
    while len(times) < (2 if FAST else 7) and sum(times) < 0.5:
        start = time.perf_counter()
        cached.backend.forward(query, cached.cache, metadata)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


with torch.inference_mode():
    clock = {
        name: ([milliseconds(name, n, n, 1) for n in LENGTHS], [milliseconds(name, n, 1, 8) for n in LENGTHS])
        for name in available
    }
_, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for ax, which, title in ((axes[0], 0, "a prompt"), (axes[1], 1, "8 sequences, one new token each")):
    for name, times in clock.items():
        ax.plot(LENGTHS, times[which], "o-", label=name)
    ax.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="ms per layer (fp32)", title=title)
    ax.set_xticks(LENGTHS, LENGTHS)
    ax.minorticks_off()
axes[0].legend();

# %% [markdown]
# ## Is it all true?

# %%
for tile in range(1, len(SCORES) + 1):
    *_, (_, m, l, O) = online(tile)
    assert abs(O / l - exact) < 1e-6 and m == max(SCORES), "any tile size gives the softmax of the whole row"
assert abs(online(TILE, rescale=False)[-1][3] / online(TILE, rescale=False)[-1][2] - exact) > 0.01, "the correction matters"
prefix = online(TILE)[1]
assert abs(prefix[3] / prefix[2] - float((scores[: 2 * TILE].softmax(0) * values[: 2 * TILE]).sum())) < 1e-6
assert computed == n * (n + 1) // 2 and len(tiles["one new token after 23"]) == n
assert all(key <= position + num_rows - 1 for seen in tiles.values() for position, num_rows, key, _, _ in seen)
assert trap[0, 1:].abs().max() == 0 and right_one[0, :3].min() > 0 and right_one[0, 3] == 0
growth = {name: sizes[-1] / sizes[0] for name, sizes in memory.items()}
times_longer = LENGTHS[-1] / LENGTHS[0]
assert growth["torch_naive"] > 0.9 * times_longer**2 and growth["torch_flash"] <= times_longer
torch.testing.assert_close(paged, oracle, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-5)
assert (plain_mean - wanted).abs().max() > 0.01 and abs(float(shares.sum()) - 1) < 1e-5
answers = {name: Cached(name, 150).attend(40) for name in available}
for name, answer in answers.items():
    torch.testing.assert_close(answer, answers["torch_naive"], rtol=1e-4, atol=1e-5, msg=name)
print(f"all true: {len(available)} backends agree; the largest tensor of naive grew {growth['torch_naive']:.0f} times, flash's {growth['torch_flash']:.1f} times")
