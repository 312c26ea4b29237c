# %% [markdown]
# # 11 · Two cuts: a matrix product on several ranks, by hand and with the engine's layers
#
# A model that is too large for one device is divided among several. First you cut a single matrix product in two ways, by hand. Then you
# run **the engine's own layers** on ranks that are threads, and count what they say to each other. Then you put a price on every
# exchange and find where more ranks stop paying, and last you fill a pipeline of stages.
#
# *35 minutes. Read [learn/09](../docs/learn/09_tensor_parallel.md) first. **Predict** asks before an experiment, and **Answer** follows it;
# `viz.ask("11.1", guess="x")` has your guess judged. Next: the exercises of [M9](../milestones/m9/README.md).*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import sys
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from folovllm import viz
from folovllm.communication_plan import ALL_REDUCE, CommunicationPlan, ring_bytes
from folovllm.distributed.thread_communicator import ThreadCommunicator, run_ranks
from folovllm.model_executor.layers.linear import MergedColumnParallelLinear
from folovllm.model_executor.models.llama import LlamaMLP
from folovllm.model_shapes import shape_architecture
from folovllm.parallel import ModelShard, ParallelConfig
from folovllm.sim.hardware import HARDWARE

viz.style()

# %% [markdown]
# ## One product, two cuts
#
# Two tokens with eight numbers each, a matrix with eight inputs and six outputs, and `RANKS` ranks. Small whole numbers, so that sums are
# exact in any order.

# %%
RANKS = 2  # 1 to 6: each rank gets a column

# %%
generator = torch.Generator().manual_seed(0)
x = torch.randint(-3, 4, (2, 8), generator=generator).float()  # [num_tokens, inputs]
W = torch.randint(-3, 4, (8, 6), generator=generator).float()  # [inputs, outputs]
whole = x @ W  # [num_tokens, outputs]
assert 1 <= RANKS <= W.shape[1], f"RANKS is 1 to {W.shape[1]}, so that each rank gets a column of W"


def columns_of(matrix, rank):
    return matrix.tensor_split(RANKS, dim=1)[rank]


def rows_of(matrix, rank):
    return matrix.tensor_split(RANKS, dim=0)[rank]


# %% [markdown]
# Cut by columns, a rank has all inputs. Cut by rows, it has the inputs that belong to its rows:

# %%
viz.ask("11.1")

# %%
by_columns = [x @ columns_of(W, rank) for rank in range(RANKS)]
by_rows = [columns_of(x, rank) @ rows_of(W, rank) for rank in range(RANKS)]

# %%
figure, axes = plt.subplots(2, RANKS + 1, figsize=(9, 2.8), layout="constrained")
LARGEST = max(part.abs().max().item() for part in [whole, *by_columns, *by_rows])
for row, (name, parts) in zip(axes, (("columns", by_columns), ("rows", by_rows))):
    for ax, part, title in zip(row, [*parts, whole], [*(f"{name}, rank {rank}" for rank in range(RANKS)), "the whole result"]):
        ax.imshow(part, cmap="RdBu", vmin=-LARGEST, vmax=LARGEST)
        ax.set(title=title, xticks=[], yticks=[])
        for i, values in enumerate(part.tolist()):
            for j, value in enumerate(values):
                colour = "white" if abs(value) > 0.7 * LARGEST else viz.INK
                ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=9, color=colour)

# %%
side_by_side = torch.equal(torch.cat(by_rows, dim=1)[:, : whole.shape[1]], whole)
viz.answer("11.1", [side_by_side, torch.equal(sum(by_rows), whole), torch.equal(by_rows[0], whole)])

# %% [markdown]
# ### Your turn: the bias of a product that is cut by rows
#
# Each rank of the row cut may add something to its result before the sum. The whole layer has a bias. What must rank `rank` add, so that
# the sum over all ranks has the bias once? Return a list of numbers, as long as the bias.

# %%
def bias_of(rank, bias):
    """`bias` is a list. Rank 0 is always there, whatever the number of ranks."""
    return None  # your code

# %%
BIASES = [((0, [1.0, 2.0]), [1.0, 2.0]), ((1, [1.0, 2.0]), [0.0, 0.0]), ((5, [4.0]), [0.0])]
viz.your_turn("11.t1", bias_of, BIASES)

# %% [markdown]
# ## Column, then row
#
# An MLP has two products with an activation in between. The activation is not linear, so it needs complete numbers. Four arrangements can
# be thought of: cut each product by columns or by rows. Count the exchanges that each arrangement needs until every rank has the whole
# result again, if every rank begins with the whole input.

# %%
viz.ask("11.2")

# %%
def exchanges(first, second):
    """How often the ranks must talk. `has` is what a rank has: the whole, its own columns, or a partial sum."""
    count, has = 0, "whole"
    for number, cut in enumerate((first, second)):
        if cut == "columns":
            count += has != "whole"  # the other ranks' columns are needed
            has = "columns"
        else:
            has = "partial sum"  # a whole input can be cut for nothing, and own columns are just what is needed
        if number == 0 and has == "partial sum":
            count, has = count + 1, "whole"  # the activation needs complete numbers
    return count + (has != "whole")


CUTS = ("columns", "rows")
needed = {f"{first}, then {second}": exchanges(first, second) for first in CUTS for second in CUTS}
viz.table(["first product, second product", "exchanges"], list(needed.items()))

# %%
viz.answer("11.2", min(needed, key=needed.get), fewest=min(needed.values()))

# %% [markdown]
# ## The engine's layers
#
# `run_ranks` calls a function once per rank, each in a thread of its own, and hands it the rank's end of the group. A layer takes that as
# `tp`. Its `weight_loader` gets the whole tensor of the checkpoint and keeps its part. This layer is `gate` and `up` as one product. The
# layer behind it, `RowParallelLinear`, is for you to write: exercise [row_split](../milestones/m9/exercises/row_split/README.md).

# %%
viz.source(MergedColumnParallelLinear)

# %%
viz.source(ThreadCommunicator.all_reduce)

# %% [markdown]
# This is the MLP of SmolLM2-135M, with random weights, on 1, 2, 3 and 4 ranks:

# %%
ARCH = shape_architecture("smollm2-135m")
TOKENS = 5  # in the step

# %%
HIDDEN, INNER = ARCH.hidden_size, ARCH.intermediate_size
weights = {
    "gate": torch.randn(INNER, HIDDEN, generator=generator) / 25,
    "up": torch.randn(INNER, HIDDEN, generator=generator) / 25,
    "down": torch.randn(HIDDEN, INNER, generator=generator) / 40,
}
tokens = torch.randn(TOKENS, HIDDEN, generator=generator)
expected = F.linear(F.silu(F.linear(tokens, weights["gate"])) * F.linear(tokens, weights["up"]), weights["down"])


def mlp_on(tp):
    """One rank's MLP: its result, how many weights it holds, and what it has said."""
    mlp = LlamaMLP(ARCH, None, "mlp", tp)
    for shard_id, name in enumerate(("gate", "up")):
        mlp.gate_up_proj.weight_loader(mlp.gate_up_proj.weight, weights[name], shard_id)
    mlp.down_proj.weight_loader(mlp.down_proj.weight, weights["down"])
    result = mlp(tokens)
    return result, sum(p.numel() for p in mlp.parameters()), tp.counts

# %%
viz.ask("11.3", TOKENS=TOKENS, HIDDEN=HIDDEN)

# %%
SIZES = [1, 2, 3, 4]
runs = {size: run_ranks(size, mlp_on) for size in SIZES}
viz.table(
    ["ranks", "weights per rank", "all-reduces", "bytes handed over", "largest difference"],
    [
        [size, ranks[0][1], ranks[0][2].calls.get(ALL_REDUCE, 0), ranks[0][2].bytes.get(ALL_REDUCE, 0),
         f"{max((result - expected).abs().max().item() for result, _, _ in ranks):.0e}"]
        for size, ranks in runs.items()
    ],
)  # fmt: skip

# %%
handed_over = {size: ranks[0][2].bytes[ALL_REDUCE] for size, ranks in runs.items() if size > 1}
viz.answer("11.3", handed_over[4] / handed_over[2], size=handed_over[2])

# %%
viz.ask("11.4")

# %%
same_bits = all(torch.equal(result, ranks[0][0]) for ranks in runs.values() for result, _, _ in ranks)
like_one_rank = all(torch.equal(result, runs[1][0][0]) for ranks in runs.values() for result, _, _ in ranks)
viz.answer("11.4", [same_bits, like_one_rank])

# %% [markdown]
# ## A whole model, and the price of an exchange
#
# `CommunicationPlan` counts a whole forward pass: two all-reduces per layer, one for the embedding, and one all-gather for the logits.
# (You write it in the exercise [communication](../milestones/m9/exercises/communication/README.md).) What a ring really sends for a call:

# %%
viz.source(ring_bytes)

# %% [markdown]
# ### Your turn: the all-reduces of a model
#
# A model has `num_layers` layers. `pp` divides that number: the layers are divided into `pp` stages, and each layer of a stage into `tp`
# parts, one per rank. How many all-reduces does a rank of the *first* stage make in a step?

# %%
def all_reduces(num_layers, tp, pp):
    return None  # your code

# %%
def planned(num_layers, tp, pp):
    import dataclasses

    arch = dataclasses.replace(ARCH, num_hidden_layers=num_layers)
    return CommunicationPlan(arch, ModelShard(tp_size=tp, pp_size=pp)).calls(1).get(ALL_REDUCE, 0)


viz.your_turn("11.t2", all_reduces, [(case, planned(*case)) for case in [(30, 3, 1), (30, 1, 1), (30, 3, 2), (80, 8, 4), (32, 1, 4)]])

# %% [markdown]
# Now the price. An all-reduce takes a constant time, its *latency*, and the time in which its bytes pass the link. The model of a step is as
# simple as that of page 04b: the weights are read once, each rank reads its part, and the all-reduces come on top. All numbers can be
# changed.

# %%
MODEL, GPU = "qwen3-8b", "h100"
LATENCY = 10e-6  # seconds per all-reduce
LINK = 300e9  # bytes per second and direction

# %%
BIG = shape_architecture(MODEL)
PARTS = [size for size in (1, 2, 4, 8, 16, 32) if BIG.num_attention_heads % size == 0]


def step_seconds(size, num_tokens=1, latency=LATENCY, link=LINK):
    """Reading (or computing, whichever takes longer), and the exchanges, of one step on `size` ranks."""
    gpu = HARDWARE[GPU]
    reading = BIG.num_parameters() * 2 / gpu.bandwidth / size
    computing = 2 * BIG.num_parameters() * num_tokens / gpu.flops / size
    plan = CommunicationPlan(BIG, ModelShard(tp_size=size))
    calls, handed = plan.calls(1).get(ALL_REDUCE, 0), plan.bytes(num_tokens, 1).get(ALL_REDUCE, 0)
    return max(reading, computing), calls * latency + ring_bytes(ALL_REDUCE, handed, size) / link

# %%
viz.ask("11.5", MODEL=MODEL, most=PARTS[-1])

# %%
alone = sum(step_seconds(1))
decode = {size: step_seconds(size) for size in PARTS}
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
places = range(len(PARTS))
left.bar(places, [1000 * own for own, _ in decode.values()], color=viz.PALETTE[0], label="reading the weights")
left.bar(places, [1000 * said for _, said in decode.values()], bottom=[1000 * own for own, _ in decode.values()], color=viz.PALETTE[1], label="all-reduces")
left.set(title="one decode step of one request, ms", xlabel="ranks")
left.legend()
prompt = {size: step_seconds(size, num_tokens=4_000) for size in PARTS}
right.plot(places, [alone / sum(step) for step in decode.values()], "o-", color=viz.PALETTE[0], label="decode, 1 token")
right.plot(places, [sum(prompt[1]) / sum(step) for step in prompt.values()], "s-", color=viz.PALETTE[2], label="prompt, 4,000 tokens")
right.plot(places, PARTS, ":", color=viz.INK, label="ideal")
right.set(title="times as fast as one rank", xlabel="ranks", yscale="log")
right.set_yticks(PARTS, PARTS)
right.minorticks_off()
right.legend()
for ax in (left, right):
    ax.set_xticks(places, PARTS)

# %%
viz.answer("11.5", alone / sum(decode[PARTS[-1]]), most=PARTS[-1], share=decode[PARTS[-1]][1] / sum(decode[PARTS[-1]]))

# %% [markdown]
# The left picture shows why: the blue part shrinks with every rank, the other part does not.
#
# ## Stages and their bubble
#
# Stages exchange almost nothing, but a batch visits them one after the other. Batches that are under way together must not need each
# other's tokens: they are decodes of different requests, or chunks of one prompt. `STAGES` stages, `BATCHES` batches, and a stage takes one
# turn for a batch. `in_flight` is how many batches may be under way at once.

# %%
STAGES, BATCHES = 4, 8

# %%
def timeline(in_flight):
    """(stage, turn) -> batch. A batch begins when stage 0 is free and the batch `in_flight` places before it has ended."""
    starts, boxes = [], {}
    for batch in range(BATCHES):
        start = starts[-1] + 1 if starts else 0
        if batch >= in_flight:
            start = max(start, starts[batch - in_flight] + STAGES)
        starts.append(start)
        boxes |= {(stage, start + stage): batch for stage in range(STAGES)}
    return boxes


def busy_share(boxes):
    """The share of all stages and turns in which something is computed."""
    turns = max(turn for _, turn in boxes) + 1
    return len(boxes) / (STAGES * turns)

# %%
viz.ask("11.6", STAGES=STAGES)

# %%
one, filled = timeline(1), timeline(STAGES)
figure, axes = plt.subplots(2, 1, figsize=(9, 3.6), layout="constrained", sharex=True)
for ax, boxes, name in zip(axes, (one, filled), ("one batch in flight", f"{STAGES} batches in flight")):
    for (stage, turn), batch in boxes.items():
        ax.barh(stage, 1, left=turn, height=0.85, color=viz.PALETTE[batch % len(viz.PALETTE)], edgecolor="white")
    ax.set(title=f"{name}: {busy_share(boxes):.0%} busy", ylabel="stage", yticks=range(STAGES))
    ax.invert_yaxis()
axes[1].set_xlabel("turn");

# %%
viz.answer("11.6", busy_share(one), STAGES=STAGES, filled=busy_share(filled))

# %% [markdown]
# ### Your turn: the bubble
#
# With `p` stages and `m` batches that follow each other without a gap, in which share of all turns is a stage idle?

# %%
def bubble(p, m):
    return None  # your code

# %%
def counted(p, m):
    boxes = {(stage, batch + stage) for batch in range(m) for stage in range(p)}
    return 1 - len(boxes) / (p * (max(turn for _, turn in boxes) + 1))


viz.your_turn("11.t3", bubble, [((p, m), counted(p, m)) for p, m in [(1, 5), (2, 2), (4, 8), (8, 1), (3, 100)]])

# %% [markdown]
# ## What this notebook claims
#
# With the numbers as delivered:

# %%
if viz.as_delivered("11", globals()):
    assert torch.equal(torch.cat(by_columns, dim=1), whole) and torch.equal(sum(by_rows), whole)
    assert needed["columns, then rows"] == 1 == min(needed.values())
    assert all((result - expected).abs().max() < 1e-4 for ranks in runs.values() for result, _, _ in ranks)
    assert all(ranks[0][2].calls.get(ALL_REDUCE, 0) == (size > 1) for size, ranks in runs.items())
    assert same_bits and not like_one_rank
    assert ParallelConfig(tensor_parallel_size=3).shard(2).num_kv_heads(ARCH.num_key_value_heads) == 1
    assert alone / sum(decode[8]) < 6 < 8, "eight ranks are far from eight times as fast for one token"
    assert busy_share(one) == 1 / STAGES and busy_share(filled) == BATCHES / (BATCHES + STAGES - 1)
    print("all claims hold")
