# %% [markdown]
# # 05 · Attention in tiles
#
# Softmax needs a whole row of scores before it can answer: the maximum, then the sum, then a division. So the obvious
# attention writes the matrix of all scores, queries x keys, to memory and reads it back twice. FlashAttention never has this
# matrix. It computes one tile of scores at a time, corrects its sums, and forgets the tile. The result is exact. In this
# notebook you write the correction, see which tiles are computed, count the memory, and cut the work of one query into parts.
#
# *30 minutes. Read [learn/04](../docs/learn/04_flash_attention.md) first; the code is in `folovllm/attention/backends/torch_flash.py`.
# **Predict** asks before an experiment, and **Answer** follows it; `viz.ask("05.1", guess=290)` has your guess judged.
# Next: [06](06_chunked_prefill.ipynb).*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import contextlib
import io
import math
import sys
import time
import warnings
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")  # where no C++ compiler is found, cpu_paged says so; below it is left out

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from torch.utils._python_dispatch import TorchDispatchMode

from folovllm import viz
from folovllm.attention.backend import AttentionSpec, sequence_slots
from folovllm.attention.backends.torch_flash import SoftmaxState, TorchFlashBackend, group_queries, ungroup_queries
from folovllm.attention.example_cache import CachedSequences
from folovllm.attention.selector import load_backend, refusal
from folovllm.csrc.build import load_ops
from folovllm.learn.three_requests import example_core, run_example

viz.style()
with contextlib.redirect_stderr(io.StringIO()):
    load_ops()  # the C++ kernels: built here if this machine does not have them yet, half a minute
CPU = torch.device("cpu")

# %% [markdown]
# ## What you can change

# %%
SCORES = [1.0, 3.0, 2.0, 0.5, 5.0, 4.0, 1.5, 2.5, 3.5, 7.0, 0.0, 1.0]  # of one query, key by key
TILE = 3  # keys that are looked at together
HEADS, KV_HEADS, SIZE, BLOCK = 9, 3, 64, 16  # SmolLM2-135M
LENGTHS = (128, 256, 512) if FAST else (128, 256, 512, 1024)  # prompts, for memory and time
PARTS = 4  # pieces that the keys of a decoding token are cut into
BACKENDS = ("torch_naive", "torch_sdpa", "torch_flash", "cpu_paged")
torch.set_num_threads(1)  # for the clock at the end: with more threads, other work on your machine disturbs it

# %%
SPEC = AttentionSpec(HEADS, KV_HEADS, SIZE, torch.float32, CPU, BLOCK)

# %% [markdown]
# ## The matrix
#
# One layer's scores are computed in fp32, 4 bytes each. Q, K, V and the output are in bf16.

# %%
viz.ask("05.1")

# %%
passes = 30 * 4 * 4 * HEADS * 8192**2 / 1e9  # 30 layers, 4 passes, 4 bytes

# %%
rows = []
for length in (512, 2048, 8192, 32768):
    matrix = 4 * HEADS * length**2
    inputs = 2 * length * SIZE * (2 * HEADS + 2 * KV_HEADS)
    rows.append([length, round(inputs / 1e6, 1), round(matrix / 1e6, 1), round(matrix / inputs)])
viz.table(["tokens", "MB of Q, K, V, output", "MB of scores", "times as much"], rows)

# %%
viz.answer("05.1", passes)

# %% [markdown]
# ## A softmax that can be corrected
#
# Go through the keys once, a tile at a time, and carry three numbers: `m`, the largest score so far; `l`, the sum of
# `exp(score - m)`; and `O`, the sum of `exp(score - m) * v`. When a tile brings a larger maximum, all earlier terms were
# computed with the old one. They all have the same wrong factor, so one multiplication corrects them.

# %%
viz.ask("05.2", first_tile=SCORES[:TILE], second_tile=SCORES[TILE : 2 * TILE])

# %%
scores = torch.tensor(SCORES)  # [keys]
values = torch.linspace(-1, 1, len(SCORES)) ** 3 + 0.5  # [keys]: one number per key, so that it can be drawn
exact = float((scores.softmax(0) * values).sum())
first_max, second_max = max(SCORES[:TILE]), max(SCORES[: 2 * TILE])
correction = math.exp(first_max - second_max)

# %%
viz.answer("05.2", correction, first=first_max, second=second_max)

# %% [markdown]
# ### Your turn: the correction
#
# Write the step from one tile to the next, with plain Python numbers. It is compared with the engine's own method.

# %%
def my_update(m, l, O, tile_scores, tile_values):  # noqa: E741
    """The new (m, l, O) after a tile. `tile_scores` and `tile_values` are lists of the same length."""

# %%
def engine_update(m, l, O, tile_scores, tile_values):  # noqa: E741
    """The same by the engine, for one query head: [num_kv_heads, rows, ...] = [1, 1, ...]."""
    flash = TorchFlashBackend(AttentionSpec(1, 1, 1, torch.float64, CPU, BLOCK))
    state = SoftmaxState(*(torch.tensor([[[x]]], dtype=torch.float64) for x in (m, l, O)))
    tile_scores = torch.tensor([[tile_scores]], dtype=torch.float64)  # [1, 1, tile]
    tile_values = torch.tensor(tile_values, dtype=torch.float64).view(1, -1, 1)  # [1, tile, 1]
    return tuple(float(x) for x in flash.update_softmax(state, tile_scores, tile_values))


CASES = [(5.0, 2.0, 3.0, [1.0], [10.0]), (2.0, 1.5, 0.5, [4.0, 3.0], [1.0, -1.0])]
known = engine_update(-1e30, 0.0, 0.0, SCORES[:TILE], values[:TILE].tolist())
for i in range(TILE, len(SCORES), TILE):
    CASES.append((*known, SCORES[i : i + TILE], values[i : i + TILE].tolist()))
    known = engine_update(*CASES[-1])
viz.your_turn("05.t1", my_update, [(case, engine_update(*case)) for case in CASES])

# %% [markdown]
# The engine does it in five lines, for all queries and heads at once. In its shapes, `group` is the number of query heads that share a KV head. They
# stand below each other in one matrix, so each KV head has `group * num_rows` rows.

# %%
viz.source(TorchFlashBackend.update_softmax)

# %% [markdown]
# Here it runs over the scores above, tile by tile, once with the correction and once without it.

# %%
def online(tile, rescale=True):
    """What is known after each tile: (keys seen, m, l, O)."""
    m, l, O = -torch.inf, 0.0, 0.0  # noqa: E741 - the names of the paper
    known = []
    for first in range(0, len(scores), tile):
        s, v = scores[first : first + tile], values[first : first + tile]
        new_m = max(m, float(s.max()))
        p = torch.exp(s - new_m)
        correction = math.exp(m - new_m) if rescale else 1.0
        l = l * correction + float(p.sum())  # noqa: E741
        O = O * correction + float((p * v).sum())
        m = new_m
        known.append((first + len(s), m, l, O))
    return known


path = online(TILE)
viz.table(["keys seen", "m", "l", "O", "O / l"], [[n, f"{m:g}", *(f"{x:.4f}" for x in (l, O, O / l))] for n, m, l, O in path])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), sharex=True)
tile_colours = [viz.PALETTE[4], viz.NOBODY]
left.bar(range(1, len(SCORES) + 1), SCORES, color=[tile_colours[(i // TILE) % 2] for i in range(len(SCORES))])
edges = [n - TILE + 0.5 for n, *_ in path] + [len(SCORES) + 0.5]
left.step(edges, [m for _, m, _, _ in path] + [path[-1][1]], where="post", color=viz.INK)
left.text(1, path[-1][1], "m, the maximum so far", size=8, va="top")
left.set(xlabel="key", ylabel="score", title="scores; a change of colour is a new tile")
for rescale, style, colour, label, at in (
    (True, "o-", viz.PALETTE[0], "with the correction", (4.2, 0.5)),
    (False, "x--", viz.PALETTE[5], "without it", (9.3, 0.2)),
):
    known = online(TILE, rescale)
    right.plot([n for n, *_ in known], [O / l for _, _, l, O in known], style, color=colour)
    right.text(*at, label, color=colour)
right.axhline(exact, color=viz.INK, lw=1, ls=":")
right.text(1, exact + 0.01, "softmax of the whole row", size=8, va="bottom")
right.set(xlabel="keys seen", ylabel="O / l", ylim=(-0.1, 0.82), title="the answer so far");

# %% [markdown]
# `O / l` is a right answer at *every* point: the attention over the keys seen so far. This is used again further down.

# %% [markdown]
# ## The tiles, and the corner that is never computed
#
# A causal model lets the token at position i see the positions 0 to i. So tiles above the diagonal need not even be read. With a
# KV cache the new queries are the *last* positions of the sequence, and the diagonal ends in the bottom right corner.

# %%
viz.ask("05.3")

# %%
def visited(length, new, tile=4):
    """(first query, queries, first key, keys, masked) of every tile that torch_flash computes, noted while it runs."""
    seen = []

    class Noting(TorchFlashBackend):
        BLOCK_Q = BLOCK_KV = tile

        def mask_future(self, scores, first_key, position, num_rows):
            keys = scores.shape[-1]
            seen.append((position, num_rows, first_key, keys, first_key + keys - 1 > position))
            super().mask_future(scores, first_key, position, num_rows)

    CachedSequences(Noting, SPEC, length).attend(new)
    return seen


many = len(visited(256, 256))

# %%
viz.answer("05.3", many / 64**2, many=many)

# %% [markdown]
# The tiles of the three requests in step 2 of [Start here](../docs/learn/00_start_here.md): a and b decode, and c computes its prompt. In the last panel 4 of c's
# tokens come from the prefix cache, so c has 8 new queries behind 4 cached keys.

# %%
step = list(run_example(example_core(num_kv_blocks=10)))[2]
CUTS = {
    f"{name}: {step.scheduled[name]} new of {step.start[name] + step.scheduled[name]}": (step.start[name] + step.scheduled[name], step.scheduled[name])
    for name in "abc"
}
CUTS["c behind 4 cached: 8 new of 12"] = (12, 8)
tiles = {name: visited(*cut) for name, cut in CUTS.items()}
figure, axes = plt.subplots(1, 4, figsize=(9.4, 3.1), sharex=True, sharey=True)
for ax, (name, seen) in zip(axes, tiles.items()):
    length, new = CUTS[name]
    ax.add_patch(Rectangle((0, length - new), length, new, fc=viz.NOBODY, ec="none"))
    for position, num_rows, key, keys, masked in seen:
        ax.add_patch(Rectangle((key, position), keys, num_rows, fc=viz.PALETTE[3 if masked else 4], ec="white", lw=1.5))
    ax.plot([length - new, length], [length - new, length], color=viz.INK, lw=1)
    ax.set(xlim=(0, 12), ylim=(12, 0), xticks=range(0, 13, 4), yticks=range(0, 13, 4), xlabel="position of the key")
    ax.set_title(name, fontsize=8)
    ax.set_aspect("equal")
axes[0].set_ylabel("position of the query")
figure.suptitle("light blue: every query sees every key. Pink: needs the mask. Grey: never computed", fontsize=9);

# %% [markdown]
# ### Your turn: which tiles are computed?
#
# A tile has the queries at positions `position` to `position + num_rows - 1`, and the keys `first_key` to
# `first_key + num_keys - 1`. Return `"skip"` if no query sees any of its keys, `"all"` if every query sees every key, and
# `"mask"` otherwise.

# %%
def my_tile(position, num_rows, first_key, num_keys):
    """Returns "skip", "all" or "mask"."""

# %%
def kind_of(position, num_rows, first_key, num_keys):
    sees = [[key <= query for key in range(first_key, first_key + num_keys)] for query in range(position, position + num_rows)]
    return "skip" if not any(map(any, sees)) else "all" if all(map(all, sees)) else "mask"


TILES = [(0, 4, 0, 4), (4, 4, 0, 4), (4, 4, 4, 4), (0, 4, 4, 4), (6, 1, 4, 3), (4, 4, 2, 4), (3, 4, 0, 4), (3, 2, 4, 4), (4, 2, 6, 2)]
viz.your_turn("05.t2", my_tile, [(tile, kind_of(*tile)) for tile in TILES])

# %% [markdown]
# The engine skips by cutting the list of slots: `slots[:last]` ends with the last key that some query of the tile may see. What is left is
# masked where it must be.

# %%
viz.source(TorchFlashBackend.attend_query_tile)

# %%
viz.source(TorchFlashBackend.mask_future)

# %% [markdown]
# ### The trap called is_causal
#
# Two new tokens at the end of a sequence of four: tokens 2 and 3 are the queries, and all four are keys. PyTorch's
# `scaled_dot_product_attention` has a switch `is_causal=True`.

# %%
viz.ask("05.4")

# %%
q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 4, 8), torch.eye(4, 8).view(1, 1, 4, 8)  # this v shows the weights
trap = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0, :, :4]  # [2, 4]
mask = torch.ones(2, 4, dtype=torch.bool).tril(diagonal=4 - 2)
wanted_weights = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0, 0, :, :4]  # [2, 4]

# %%
viz.table(
    ["query", "weights with is_causal=True", "weights wanted"],
    [[f"token {i + 2}", " ".join(f"{w:.2f}" for w in a), " ".join(f"{w:.2f}" for w in b)] for i, (a, b) in enumerate(zip(trap, wanted_weights))],
)

# %%
viz.answer("05.4", int((trap[0] > 0).sum()))

# %% [markdown]
# ## The largest tensor
#
# The claim "never builds the matrix" can be checked: a dispatch mode sees every tensor that a torch operator makes.

# %%
longer = LENGTHS[-1] // LENGTHS[0]

# %%
viz.ask("05.5", options=[longer, 2 * longer, longer**2], shortest=LENGTHS[0], longest=LENGTHS[-1], longer=longer)

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
    cached = CachedSequences(load_backend(name), SPEC, length)
    metadata = cached.step(length)
    with LargestTensor() as mode:
        cached.backend.forward(cached.query, cached.cache, metadata)
    return mode.nbytes


memory = {name: [largest(name, length) for length in LENGTHS] for name in ("torch_naive", "torch_flash")}
growth = {name: sizes[-1] / sizes[0] for name, sizes in memory.items()}

# %%
figure, ax = plt.subplots(figsize=(7, 3))
for (name, sizes), colour in zip(memory.items(), (viz.PALETTE[5], viz.PALETTE[0])):
    ax.plot(LENGTHS, [s / 1e6 for s in sizes], "o-", color=colour)
    ax.annotate(name, (LENGTHS[-1], sizes[-1] / 1e6), (6, -3), textcoords="offset points", color=colour)
scale = [2 * 4 * n * HEADS * SIZE / 1e6 for n in LENGTHS]
ax.plot(LENGTHS, scale, ":", color=viz.INK, lw=1)
ax.annotate("queries and output,\nfor scale", (LENGTHS[-1], scale[-1]), (6, -6), textcoords="offset points", color=viz.INK, size=8)
ax.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="MB", title="the largest tensor made in one layer")
ax.set_xlim(LENGTHS[0] * 0.9, LENGTHS[-1] * 1.9)
ax.set_xticks(LENGTHS, LENGTHS)
ax.set_yticks([1, 10], ["1", "10"])
ax.minorticks_off();

# %%
nearest = min([longer, 2 * longer, longer**2], key=lambda option: abs(option - growth["torch_naive"]))
viz.answer("05.5", nearest, flash=growth["torch_flash"])

# %% [markdown]
# ## Tiles and blocks
#
# `attend_tiles` looks up the keys of a tile when it gets to them. So the keys may lie anywhere, and the block table of the paged
# KV cache costs nothing extra. The loop gets slots, not keys:

# %%
viz.source(TorchFlashBackend.attend_tiles)

# %%
cached = CachedSequences(TorchFlashBackend, SPEC, 200)
oracle = CachedSequences(load_backend("torch_naive"), SPEC, 200).attend(200)  # [200, heads, size]
by_slot = cached.backend.by_slot(cached.cache)  # [2, slots, kv_heads, size]
slots = sequence_slots(cached.table[0], 200, BLOCK)  # [200]
q = group_queries(cached.query * SIZE**-0.5, KV_HEADS)  # [kv_heads, group * 200, size]
out, lse = cached.backend.attend_tiles(q, by_slot, slots, position=0, num_rows=200)
paged = ungroup_queries(out, 200)
print("blocks", cached.table[0].tolist(), "| largest difference to torch_naive:", f"{(paged - oracle).abs().max():.1e}")

# %% [markdown]
# ## Split-KV: one query, many workers
#
# A decoding sequence has one query, so one row of tiles, and one worker would compute it from left to right while the others
# wait. But `O / l` is right for any set of keys. So the *keys* are cut into parts of equal length, and each worker attends to
# its part alone. How do the results become one?

# %%
viz.ask("05.6")

# %%
position = 199  # the last token decodes
one = group_queries(cached.query[-1:] * SIZE**-0.5, KV_HEADS)  # [kv_heads, group, size]
cuts = [round(i * 200 / PARTS) for i in range(PARTS + 1)]
parts = [cached.backend.attend_tiles(one, by_slot, slots[a:b], position, 1, first_key=a) for a, b in zip(cuts, cuts[1:])]
merged, total = cached.backend.merge_partials([o for o, _ in parts], [e for _, e in parts])
plain_mean = torch.stack([o for o, _ in parts]).mean(0)
shares = torch.stack([(e - total).exp()[0, 0] for _, e in parts])  # of KV head 0's first query head
wanted = group_queries(oracle[-1:], KV_HEADS)

# %%
print(f"merged by weight: {(merged - wanted).abs().max():.1e} off; the plain mean: {(plain_mean - wanted).abs().max():.2f} off")
viz.table(
    ["part", "keys", "share of the weight", "largest difference of this part alone"],
    [[i, f"{a} to {b - 1}", f"{float(s):.1%}", float((o - wanted).abs().max())] for i, (a, b, s, (o, _)) in enumerate(zip(cuts, cuts[1:], shares, parts))],
)

# %%
viz.answer("05.6", bool((plain_mean - wanted).abs().max() < 1e-4))

# %% [markdown]
# ### Your turn: merge two parts
#
# So each part also returns how much weight it holds: `lse = log(sum of exp(score))`. Merge the results of two parts, plain
# numbers `out_1` and `out_2` with their `lse_1` and `lse_2`, into the result over all keys.

# %%
def my_merge(out_1, lse_1, out_2, lse_2):
    """The attention over the keys of both parts."""

# %%
def part_of(keys):
    return float((scores[keys].softmax(0) * values[keys]).sum()), float(scores[keys].logsumexp(0))


def engine_merge(*parts):
    outs, lses = (torch.tensor(x, dtype=torch.float64) for x in (parts[::2], parts[1::2]))
    out, _ = cached.backend.merge_partials([o.view(1, 1) for o in outs], [e.view(1) for e in lses])
    return float(out)


MERGES = [(*part_of(slice(0, n)), *part_of(slice(n, None))) for n in (3, 6, 10)] + [(1.0, 0.0, 3.0, 0.0)]
viz.your_turn("05.t3", my_merge, [(case, engine_merge(*case)) for case in MERGES])

# %%
viz.source(TorchFlashBackend.merge_partials)

# %% [markdown]
# ## The clock
#
# One layer, the backends that can run here, and two kinds of work: a whole prompt, and 8 sequences that decode one token each.
#
# - `torch_naive` makes the matrix of all scores, for one sequence after the other.
# - `torch_sdpa` copies K and V of a sequence together and calls PyTorch's `scaled_dot_product_attention`.
# - `torch_flash` is the loop over tiles above, in Python.
# - `cpu_paged` is C++ (if a compiler is found): tiles as well, and K and V are read in their blocks, without a copy.

# %%
available = [name for name in BACKENDS if refusal(name, SPEC) is None]

# %%
viz.ask("05.7", options=available, longest=LENGTHS[-1])

# %%
def milliseconds(name, length, new, num_seqs):
    cached = CachedSequences(load_backend(name), SPEC, length, num_seqs)
    query, metadata, times = cached.last_queries(new), cached.step(new), []
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

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.4, 3.4), sharex=True, sharey=True)
for ax, which, title in ((axes[0], 0, "a prompt"), (axes[1], 1, "8 sequences, one new token each")):
    for (name, times), colour in zip(clock.items(), (viz.PALETTE[5], viz.PALETTE[3], viz.PALETTE[0], viz.PALETTE[2])):
        ax.plot(LENGTHS, times[which], "o-", color=colour, label=name)
    ax.set(xscale="log", yscale="log", xlabel="tokens of context", title=title)
    ax.set_xticks(LENGTHS, LENGTHS)
    ax.minorticks_off()
axes[0].set_ylabel("ms per layer (fp32)")
axes[1].legend(fontsize=8);

# %%
last = {name: clock[name][1][-1] for name in available}
viz.answer("05.7", min(last, key=last.get), flash=last["torch_flash"], naive=last["torch_naive"])

# %% [markdown]
# For a prompt, the time of torch_naive grows with the square of the length, because its matrix does. In decoding there is hardly a
# matrix, and tiles alone lose: each of them costs a dozen calls into torch.
#
# ## Is it all true?

# %%
if viz.as_delivered("05", globals()):
    for tile in range(1, len(SCORES) + 1):
        *_, (_, m, l, O) = online(tile)
        assert abs(O / l - exact) < 1e-6 and m == max(SCORES), "any tile size gives the softmax of the whole row"
    assert abs(online(TILE, rescale=False)[-1][3] / online(TILE, rescale=False)[-1][2] - exact) > 0.01, "the correction matters"
    prefix = online(TILE)[1]
    assert abs(prefix[3] / prefix[2] - float((scores[: 2 * TILE].softmax(0) * values[: 2 * TILE]).sum())) < 1e-6
    assert many == 64 * 65 // 2 and [len(seen) for seen in tiles.values()] == [2, 2, 6, 5]
    assert all(kind_of(*tile[:4]) == ("mask" if tile[4] else "all") for seen in tiles.values() for tile in seen)
    assert trap[0, 1:].abs().max() == 0 and wanted_weights[0, :3].min() > 0 and wanted_weights[0, 3] == 0
    assert growth["torch_naive"] > 0.9 * longer**2 and growth["torch_flash"] <= longer
    torch.testing.assert_close(paged, oracle, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-5)
    assert (plain_mean - wanted).abs().max() > 0.01 and abs(float(shares.sum()) - 1) < 1e-5
    answers = {name: CachedSequences(load_backend(name), SPEC, 150).attend(40) for name in available}
    for name, answer in answers.items():
        torch.testing.assert_close(answer, answers["torch_naive"], rtol=1e-4, atol=1e-5, msg=name)
    print(f"all true: {len(available)} backends agree; the largest tensor of torch_naive grew {growth['torch_naive']:.0f} times, torch_flash's {growth['torch_flash']:.1f} times")
