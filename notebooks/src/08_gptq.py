# %% [markdown]
# # 08 · Four bits per weight: GPTQ
#
# Rounding a weight to one of 16 levels makes an error. GPTQ lets the weights that are still free make up for it. How
# well they can depends on one thing: how much the **inputs** of the layer have in common. In this notebook you change
# that, and bits, groups, order and calibration text, on layers small enough to see. At the end a tiny real model is
# quantised and run. The engine's own quantiser does all of it.
#
# *40 minutes. Read first: [learn/07](../docs/learn/07_gptq_quantization.md), the algorithm, and
# [learn/07b](../docs/learn/07b_gptq_in_practice.md), the file, the kernel and the cost. The exercises behind "your turn"
# are [rtn](../milestones/m7/exercises/rtn/README.md), [gptq_step](../milestones/m7/exercises/gptq_step/README.md) and
# [pack_int4](../milestones/m7/exercises/pack_int4/README.md). **Predict** asks before an experiment, and **Answer** follows
# it; `viz.ask("08.1", guess="about 17")` has your guess judged. Next: [09](09_ablation.ipynb).*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import contextlib
import io
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch
from matplotlib import pyplot as plt

from folovllm import viz
from folovllm.csrc.build import load_ops
from folovllm.gptq_config import GPTQConfig
from folovllm.model_executor.layers.quantization.packing import Packing
from folovllm.quantize.example_layer import example_layer
from folovllm.quantize.gptq import GPTQ, Hessian, output_error, rtn_quantize
from folovllm.quantize.grid import Grid
from folovllm.model_shapes import shape_architecture
from folovllm.sim.hardware import HARDWARE

viz.style()
torch.set_num_threads(1)
with contextlib.redirect_stderr(io.StringIO()):
    load_ops()  # the C++ kernels; if this machine has not built them yet, that takes half a minute

# %% [markdown]
# ## What you can change

# %%
BITS, GROUP = 4, 32
INPUTS, OUTPUTS, TOKENS = 96, 48, 1500
CORRELATION = 0.8  # how much the inputs share: 0 nothing, 1 everything
SEEDS = range(3 if FAST else 10)
COLOURS = dict(zip(["RTN", "GPTQ", "act-order"], viz.PALETTE[5:6] + viz.PALETTE[0:1] + viz.PALETTE[2:3], strict=True))

# %% [markdown]
# ## The grid
#
# One group of 64 weights (blue) and the levels they may take (grey). More bits make the grid denser. The more weights share
# one grid, the likelier one of them is large and makes all steps coarse. The grids are symmetric: the largest |weight| sets
# the step. One of the 2, 4, 8, ... levels stands for zero, so there is one more below zero than above it, and the largest
# weight, at 2.75, is cut to the highest level. With 2 bits this costs most.

# %% tags=["given"]
weights = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))


def rounding_error(bits):
    grid = Grid.find(weights, GPTQConfig(bits))
    return float(((weights - grid.values(grid.levels(weights))) ** 2).mean())


figure, axes = plt.subplots(1, 3, figsize=(10, 1.6), sharey=True, sharex=True)
for ax, bits in zip(axes, (2, 3, 4), strict=True):
    grid = Grid.find(weights, GPTQConfig(bits))
    values = grid.values(torch.arange(2**bits).float()[None])[0].tolist()
    ax.vlines(values, 0, 1, color="#999999", lw=2)
    ax.plot(weights[0], [0.5] * 64, "|", ms=18, color=viz.PALETTE[0])
    ax.set(title=f"{bits} bits: {2**bits} levels, mean squared error {rounding_error(bits):.4f}", yticks=[])

# %%
viz.ask("08.1")

# %%
ratio = rounding_error(4) / rounding_error(8)

# %%
viz.answer("08.1", ratio)

# %% [markdown]
# Rounding to nearest (RTN) takes one line. **Your turn**: write it for the weights of one group.

# %%
def nearest_levels(weights, scale, zero, max_level):
    """The nearest level of each weight, as whole numbers. A level stands for scale * (level - zero)."""
    # Your turn: replace this line by a list, such as [... for w in weights].

# %%
def engine_levels(weights, scale, zero, max_level):
    grid = Grid(torch.tensor([scale]), torch.tensor([float(zero)]), max_level)
    return [int(level) for level in grid.levels(torch.tensor([weights]))[0]]


GROUPS = [([-0.3, 0.9, 0.1, 0.5], 0.4, 1, 3), ([-0.35, 0.9, 0.1, 0.5], 0.6, 2, 3), ([5.0, -5.0], 0.5, 8, 15)]
viz.your_turn("08.t1", nearest_levels, [(group, engine_levels(*group)) for group in GROUPS])

# %%
viz.source(Grid.levels)

# %% [markdown]
# ## What the inputs say: H
#
# H = X X^T: for each pair of inputs, the sum of their products over the tokens of a text. The pictures show it as
# correlations: blue is two inputs that move
# together, red is two that move against each other. In both cases a weight of one input can do the work of the other.
# On the left is the layer of the page. On the right are 96 inputs in eight families of twelve; the inputs of a family
# share a signal, as strongly as CORRELATION says, and have nothing in common with the other families.

# %%
def make_inputs(correlation=CORRELATION, seed=0, tokens=TOKENS):
    """[tokens, inputs]: eight shared signals, noise, and inputs of different strength."""
    generator = torch.Generator().manual_seed(seed)
    family = torch.arange(INPUTS) * 8 // INPUTS  # [inputs]
    sign = torch.where(torch.arange(INPUTS) % 12 < 8, 1, -1)  # a third of each family moves against the rest
    strength = torch.rand(INPUTS, generator=generator) * 2 + 0.1
    signals, noise = (torch.randn(tokens, n, generator=generator) for n in (8, INPUTS))
    return (correlation**0.5 * signals[:, family] * sign + (1 - correlation) ** 0.5 * noise) * strength


def hessian_of(x):
    hessian = Hessian(x.shape[1])
    hessian.add(x)
    return hessian.matrix


def make_weight(seed=0):
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(100 + seed))


figure, axes = plt.subplots(1, 2, figsize=(7.6, 3))
for ax, h, title in (
    (axes[0], example_layer()[1], "the 8 inputs of the page"), (axes[1], hessian_of(make_inputs()), f"{INPUTS} inputs"),
):  # fmt: skip
    scale = h.diagonal().sqrt()
    image = ax.imshow(h / scale[:, None] / scale, cmap="RdBu", vmin=-1, vmax=1)
    ax.set(title=title, xlabel="input", ylabel="input")
figure.colorbar(image, ax=axes, label="correlation");

# %% [markdown]
# ## One step
#
# If a column is fixed at its rounded value, the columns after it move so that the outputs change least. U is the
# triangle with U^T U = H^-1. The error of column i, divided by U_ii, is taken off all columns from i on, each times its
# entry of row i of U. **Your turn:**

# %%
def one_step(weights, i, rounded, u):
    """One row of weights after weight i is fixed at `rounded`. u is row i of U; entries before i are 0."""
    # Your turn: return a new list. Weights before i stay, weight i becomes `rounded`, later ones move.

# %%
def engine_step(weights, i, rounded, u):
    work, root = torch.tensor([weights], dtype=torch.float64), torch.zeros(len(u), len(u), dtype=torch.float64)
    root[i] = torch.tensor(u)
    GPTQ(GPTQConfig(4)).step(work, i, torch.tensor([rounded]), root)
    return work[0].tolist()


ROWS = [([0.4, 0.4], 0, 0.0, [1.0, -0.5]), ([0.5, 0.25, -0.75], 1, 0.5, [0.0, 2.0, 1.0]), ([1.0, 2.0, 2.5], 2, 3.0, [0.0, 0.0, 0.5])]
viz.your_turn("08.t2", one_step, [(row, engine_step(*row)) for row in ROWS])

# %%
viz.source(GPTQ.step)

# %% [markdown]
# ## Column by column
#
# The 8 x 8 layer of the page with 3 bits. First, a question about what comes out:

# %%
viz.ask("08.2")

# %%
weight, hessian = example_layer()
config = GPTQConfig(3)
gptq = GPTQ(config)
grid, root, work, plain = Grid.find(weight, config), gptq.damped_root(hessian), weight.clone(), weight.clone()
rows, lost = [], {"RTN": [0.0], "GPTQ": [0.0]}
for i in range(8):
    gptq.step(work, i, grid.values(grid.levels(work[:, i])), root)
    plain[:, i] = grid.values(grid.levels(weight[:, i]))
    lost["GPTQ"].append(100 * output_error(weight, work, hessian))
    lost["RTN"].append(100 * output_error(weight, plain, hessian))
    rows.append([f"column {i}", *(f"{v + 0.0:.2f}" + ("" if j > i else " *") for j, v in enumerate(work[2].tolist()))])
further = float(((weight - work) ** 2).sum() / ((weight - plain) ** 2).sum())

# %% [markdown]
# What row 2 becomes (* is fixed), and below it the share of *all* outputs that is lost after every column. With RTN no
# column makes up for another.

# %%
viz.table(["row 2 after", *map(str, range(8))], rows)

# %%
figure, ax = plt.subplots(figsize=(7, 2.4))
for name, values in lost.items():
    ax.plot(range(9), values, "o-", ms=4, color=COLOURS[name])
    ax.text(8.1, values[-1], name, va="center", color=COLOURS[name])
ax.set(xlabel="columns rounded", ylabel="% of the output lost", xlim=(0, 8.8));

# %%
viz.answer("08.2", further)

# %% [markdown]
# ## When can it help?
#
# The same layer of 96 inputs, with more and more in common. The picture also shows *act-order*, GPTQ that takes the strongest inputs
# first. The next section is about it.

# %%
viz.ask("08.3")

# %%
def relative_errors(correlation, seed, bits=BITS, group=GROUP):
    """Errors of GPTQ and of GPTQ with act-order, in units of RTN's."""
    weight, h = make_weight(seed), hessian_of(make_inputs(correlation, seed))
    nearest = output_error(weight, rtn_quantize(weight, GPTQConfig(bits, group)).dequantize(), h)
    configs = [GPTQConfig(bits, group, desc_act=order) for order in (False, True)]
    return [output_error(weight, GPTQ(c).quantize(weight, h).dequantize(), h) / nearest for c in configs]


shares = [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99]
curves = torch.tensor([[relative_errors(share, seed) for seed in SEEDS] for share in shares]).mean(1)
independent = torch.diag(torch.linspace(1, 5, INPUTS))  # H of inputs that have nothing to do with each other
same = torch.equal(
    GPTQ(GPTQConfig(BITS, GROUP)).quantize(make_weight(), independent).levels,
    rtn_quantize(make_weight(), GPTQConfig(BITS, GROUP)).levels,
)

# %%
figure, ax = plt.subplots(figsize=(7, 2.6))
ax.axhline(1, color=COLOURS["RTN"])
ax.text(0.5, 0.97, "RTN", va="top", color=COLOURS["RTN"])
for column, name in enumerate(("GPTQ", "act-order")):
    ax.plot(shares, curves[:, column], "o-", ms=4, color=COLOURS[name], label=name)
ax.set(xlabel="correlation within a family", ylabel="error / RTN's error", ylim=(0, 1.1))
ax.legend(loc="lower left");

# %%
viz.answer("08.3", same, measured=float(curves[0, 0]))

# %% [markdown]
# ## In which order?
#
# Columns that come late have few free columns to make up for their errors. So which should come last?

# %%
viz.ask("08.4")

# %%
def with_order(weight, h, order, bits=BITS):
    """GPTQ with one group per output, its columns in `order`."""
    ordered = GPTQ(GPTQConfig(bits)).quantize(weight[:, order], h[order][:, order]).dequantize()
    return output_error(weight[:, order], ordered, h[order][:, order])


orders = {name: [] for name in ("strongest first", "as they come", "weakest first")}
for seed in SEEDS:
    w, h = make_weight(seed), hessian_of(make_inputs(CORRELATION, seed))
    falling = h.diagonal().argsort(descending=True)
    nearest = output_error(w, rtn_quantize(w, GPTQConfig(BITS)).dequantize(), h)
    for name, order in zip(orders, (falling, torch.arange(INPUTS), falling.flip(0)), strict=True):
        orders[name].append(with_order(w, h, order) / nearest)
mean_of_order = {name: sum(values) / len(values) for name, values in orders.items()}

# %%
viz.table(["order", "error / RTN's"], [[name, value] for name, value in mean_of_order.items()])

# %%
worst, best = (pick(mean_of_order, key=mean_of_order.get) for pick in (max, min))
viz.answer("08.4", (worst == "weakest first") - (best == "weakest first"))

# %% [markdown]
# ## Grids that grow
#
# The grid of a group is fixed when its first column comes up. By then the weights have made up for earlier errors, and
# some have grown. `static_groups=True` takes all grids from the original weights instead.

# %%
viz.ask("08.5")

# %%
def tangled_layer(seed=0, inputs=256):
    """(weight, H) of a layer in which every input is a mixture of 128 signals."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((1000, 128), (128, inputs), (1000, inputs))
    signals, mixing, noise = (torch.randn(*size, generator=generator) for size in sizes)
    strength = torch.rand(inputs, generator=generator) * 2 + 0.1
    h = hessian_of((signals @ mixing / 128**0.5 + 0.1 * noise) * strength)
    return torch.randn(32, inputs, generator=generator), h


w, h = tangled_layer()
growth, static_lost = {}, {}
for bits in (2, 3, 4):
    c = GPTQConfig(bits, 32)
    growing, static = (GPTQ(c, static_groups=fixed).quantize(w, h) for fixed in (False, True))
    growth[bits] = (growing.scales.mean(1) / static.scales.mean(1)).tolist()
    static_lost[bits] = [100 * output_error(w, q.dequantize(), h) for q in (rtn_quantize(w, c), growing, static)]

# %%
figure, ax = plt.subplots(figsize=(7, 2.4))
for (bits, values), colour in zip(growth.items(), viz.PALETTE, strict=False):
    ax.plot(range(8), values, "o-", ms=4, color=colour, label=f"{bits} bits")
ax.set(xlabel="group, in the order of rounding", ylabel="scale / original scale", ylim=(0.9, None))
ax.legend();

# %%
viz.table(["bits", "% lost, RTN", "% lost, GPTQ", "% lost, GPTQ with static groups"], [[bits, *lost_by] for bits, lost_by in static_lost.items()])

# %%
grown = {bits: values[-1] for bits, values in growth.items()}
viz.answer("08.5", max(grown, key=grown.get), two=grown[2], four=grown[4], growing=static_lost[2][1], static=static_lost[2][2])

# %% [markdown]
# ## Bits and groups: what does a weight cost, and what does it buy?
#
# Each group brings a scale of 16 bits and a zero. So a group of 8 is expensive:

# %%
def bits_per_weight(bits, group):
    return bits + (16 + bits) / (INPUTS if group == -1 else group)

# %%
viz.ask("08.6", small=bits_per_weight(3, 8), one=bits_per_weight(4, -1))

# %%
points = {}
for bits in (2, 3, 4):
    for group in (-1, *(size for size in (96, 48, 32, 16, 8) if INPUTS % size == 0)):
        w, h = make_weight(), hessian_of(make_inputs())
        points[bits, group] = 100 * output_error(w, GPTQ(GPTQConfig(bits, group)).quantize(w, h).dequantize(), h)

# %%
figure, ax = plt.subplots(figsize=(7, 2.8))
for bits, colour in zip((2, 3, 4), viz.PALETTE, strict=False):
    chosen = [group for b, group in points if b == bits and group != -1]
    x = [bits_per_weight(bits, group) for group in chosen]
    ax.plot(x, [points[bits, group] for group in chosen], "o-", ms=4, color=colour, label=f"{bits} bits")
    for group, at in zip(chosen, x, strict=True):
        ax.annotate(str(group), (at, points[bits, group]), textcoords="offset points", xytext=(3, 4), size=8)
ax.set(xlabel="bits per weight, scales and zeros counted (at the points: group size)", ylabel="% lost", yscale="log")
ax.set_yticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
ax.minorticks_off()
ax.legend();

# %%
viz.answer("08.6", points[4, -1] < points[3, 8], one=points[4, -1], small=points[3, 8])

# %% [markdown]
# ## How much text does it need?
#
# H is estimated from calibration tokens. With fewer tokens than inputs H is singular, and only *damping* makes it
# invertible: a share of the mean of H's diagonal is added to the diagonal
# ([learn/07](../docs/learn/07_gptq_quantization.md)). The error below is measured on *other* tokens of the same kind.

# %%
viz.ask("08.7", INPUTS=INPUTS)

# %%
counts, damps = [8, 16, 48, 96, 192, 400, 1500], (0.0001, 0.01, 0.1)


def errors_on_other_text(seed):
    """[damps, counts]: errors beside RTN's of a layer that was calibrated with few tokens."""
    x, w = make_inputs(seed=seed, tokens=4500), make_weight(seed)
    held_out, config = hessian_of(x[1500:]), GPTQConfig(BITS, GROUP)

    def error(quantized):
        return output_error(w, quantized.dequantize(), held_out)

    nearest = error(rtn_quantize(w, config))
    hessians = [hessian_of(x[:count]) for count in counts]
    return [[error(GPTQ(config, damp).quantize(w, h)) / nearest for h in hessians] for damp in damps]


learnt = dict(zip(damps, torch.tensor([errors_on_other_text(seed) for seed in SEEDS]).mean(0).tolist(), strict=True))
overfitted = learnt[0.0001][counts.index(48)]

# %%
figure, ax = plt.subplots(figsize=(7, 2.8))
for (damp, values), colour in zip(learnt.items(), viz.PALETTE, strict=False):
    ax.plot(counts, values, "o-", ms=4, color=colour, label=f"damp {damp:g}")
ax.axhline(1, color=viz.INK, lw=0.8, ls=":")
ax.text(1500, 1.03, "RTN", ha="right", va="bottom", color=viz.INK)
ax.axvline(INPUTS, color=viz.INK, lw=0.8, ls=":")
ax.text(INPUTS * 1.05, 1.5, f"as many tokens as inputs, {INPUTS}", color=viz.INK)
ax.set(xscale="log", xlabel="calibration tokens", ylabel="error / RTN's, other text", ylim=(0, None))
ax.set_xticks(counts, map(str, counts))
ax.minorticks_off()
ax.legend(loc="upper right");

# %%
viz.answer("08.7", overfitted)

# %% [markdown]
# ## What lies in the file
#
# The levels of eight inputs of one output are one word of `qweight`. **Your turn:**

# %%
def pack_word(levels):
    """Eight levels of 4 bits in one number below 2**32, the first in the lowest four bits."""
    # Your turn: return a number.

# %%
def engine_word(levels):
    return int(Packing(4).pack_rows(torch.tensor(levels).unsqueeze(1))) % 2**32  # int32 has a sign


WORDS = [[0, 1, 2, 3, 4, 5, 6, 7], [6, 2, 3, 6, 1, 4, 2, 15], [8] * 8]
viz.your_turn("08.t3", pack_word, [((levels,), engine_word(levels)) for levels in WORDS])

# %%
viz.source(Packing.pack_rows)

# %% [markdown]
# The 8 x 8 layer again, with 4 bits: read the hexadecimal digits of a word from the right. All zeros are 8, and the
# v1 format stores them as 7.

# %%
config = GPTQConfig(4, 8)
quantized = GPTQ(config).quantize(*example_layer())
tensors = quantized.pack(config)
words = [f"{word % 2**32:08X}" for word in tensors["qweight"].flatten().tolist()]
viz.table(
    ["output", "levels of inputs 0 to 7", "qweight", "scale", "zero", "in qzeros"],
    [[o, " ".join(map(str, quantized.levels[o].tolist())), words[o], f"{quantized.scales[0, o]:.4f}",
      int(quantized.zeros[0, o]), f"{tensors['qzeros'].item() % 2**32:08X}"[7 - o]] for o in range(8)],
)  # fmt: skip

# %% [markdown]
# ## A tiny real model
#
# Two Llama layers with random weights, quantised by the function behind `folovllm quantize`. It reports the error of
# each linear layer beside RTN's:

# %%
from folovllm import LLM, SamplingParams
from folovllm.quantize.perplexity import engine_scorer
from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint

VOCABULARY = 256


def make_tiny_llama(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, initializer_range=0.2, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(7)
    LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def random_tokens(count, length, seed):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


scratch = tempfile.TemporaryDirectory()
with contextlib.redirect_stderr(io.StringIO()):
    source = make_tiny_llama(Path(scratch.name) / "plain")
folders, errors = {}, {}
for bits in (8, 4, 2):
    folders[bits] = Path(scratch.name) / f"q{bits}"
    settings = QuantizeSettings(GPTQConfig(bits, 32))
    errors[bits] = quantize_checkpoint(source, folders[bits], settings, random_tokens(6, 48, seed=0), progress=False)
viz.table(
    ["layer", "linear", "% lost, RTN", "% lost, GPTQ"],
    [[str(e.layer), e.linear, f"{100 * e.rtn_error:.3f}", f"{100 * e.error:.3f}"] for e in errors[4]],
)  # fmt: skip

# %% [markdown]
# Two questions are often mixed up. The first: does *quantising* change what the model says? Of course it does. The
# table shows how far the log probabilities of a text move. (A model with random weights has no opinion on anything, so
# every change moves it far; trained models are tougher.)

# %%
def score(folder):
    return engine_scorer(folder, quantization="auto")(random_tokens(1, 200, seed=5)[0], 1)


truth = score(source)
moved = {bits: float((score(folder) - truth).abs().mean()) for bits, folder in folders.items()}
sizes = {bits: sum(file.stat().st_size for file in folder.glob("model-0000[23]*")) for bits, folder in folders.items()}
viz.table(
    ["bits", "mean change of log p", "both layers in the file, bytes"],
    [[bits, moved[bits], f"{sizes[bits]:,}"] for bits in sizes],
)  # fmt: skip

# %% [markdown]
# The second question: does *running* packed weights change anything, compared with the same weights unpacked?

# %%
viz.ask("08.8")

# %%
prompts = [{"prompt_token_ids": [3 + (7 * i + k) % 200 for k in range(12)]} for i in range(4)]
params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0, detokenize=False)
with contextlib.redirect_stderr(io.StringIO()):
    tokens = {}
    for quantization in ("auto", "dequantize"):
        llm = LLM(
            str(folders[4]), dtype="float32", max_model_len=64, quantization=quantization, skip_tokenizer_init=True
        )
        answers = llm.generate(prompts, params, use_tqdm=False)
        tokens[quantization] = [tuple(answer.outputs[0].token_ids) for answer in answers]

# %%
viz.answer("08.8", sum(a == b for pair in zip(*tokens.values(), strict=True) for a, b in zip(*pair, strict=True)))

# %% [markdown]
# ## Where are four bits slower?
#
# The roofline of [learn/07b](../docs/learn/07b_gptq_in_practice.md): reading against multiplying, for the linear layers
# of SmolLM2-135M on the reference machine (two cores, measured rates). In memory a weight has 4.5 bits: 4, and a share of the
# scale. The kernel keeps one scale in fp32 for 64 weights, and no zeros, because the grids are symmetric. (The file has scales
# of 16 bits, and zeros.)

# %%
viz.ask("08.9")

# %%
viz.ask("08.10")

# %%
arch = shape_architecture("smollm2-135m")
WEIGHTS = arch.num_parameters() - arch.vocab_size * arch.hidden_size - (2 * arch.num_hidden_layers + 1) * arch.hidden_size
BF16, INT4 = 16, 4 + 32 / 64  # bits per weight
CPU = HARDWARE["cpu"]
# Vector instructions for a line of 128 weights (learn/07b): DOTS for each token, with or without unpacking. Unpacking needs
# UNPACK more for each tile of up to TILE tokens, and SCALE more for each token, once in LINES lines.
DOTS, UNPACK, TILE, SCALE, LINES = 4, 4, 6, 10, 16
BF16_LINE = 4 + 4 / 8  # dot products, and 4 loads for each tile of 8 tokens


def seconds(tokens, bits, machine=CPU, free_unpacking=False):
    """The longer of reading and multiplying, which takes as long as its instructions beside those of bf16."""
    work = tokens
    if bits == INT4 and not free_unpacking:
        work = (tokens * (DOTS + SCALE / LINES) + -(-tokens // TILE) * UNPACK) / BF16_LINE
    return max(WEIGHTS * bits / 8 / machine.bandwidth, 2 * WEIGHTS * work / machine.flops)


gain = seconds(1, BF16) / seconds(1, INT4)

# %%
crossover = max(n for n in range(1, 100) if seconds(n, INT4) <= seconds(n, BF16))

# %% [markdown]
# On the right, the same for GPUs, *as if unpacking cost nothing*: the upper bound of what any 4-bit kernel can gain.
# How near a kernel comes to it must be measured on that GPU; the count of our CPU's instructions says nothing about it.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 2.9))
counts_cpu, counts_gpu = range(1, 33), range(1, 513)
for bits, colour in ((BF16, viz.PALETTE[0]), (INT4, viz.PALETTE[5])):
    axes[0].plot(counts_cpu, [1e3 * seconds(n, bits) for n in counts_cpu], color=colour, label=f"{bits} bits")
axes[0].axvline(crossover, color=viz.INK, lw=0.8, ls=":", label=f"4 bits win up to {crossover} tokens")
axes[0].set(title="the reference CPU", xlabel="tokens in the step", ylabel="ms", ylim=(0, None), xlim=(1, 32))
axes[0].legend()
for name, colour in (("a100", viz.PALETTE[2]), ("h100", viz.PALETTE[3])):
    machine = HARDWARE[name]
    bound = [seconds(n, BF16, machine) / seconds(n, INT4, machine, free_unpacking=True) for n in counts_gpu]
    axes[1].plot(counts_gpu, bound, color=colour, label=machine.name)
axes[1].set(title="GPUs, upper bound of the gain", xlabel="tokens in the step", ylabel="times faster", xscale="log")
axes[1].set(ylim=(0, 4))
axes[1].set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
axes[1].legend();

# %%
viz.answer("08.9", round(gain, 1))

# %%
many = seconds(32, BF16) / seconds(32, INT4)
viz.answer("08.10", many, crossover=crossover, knee=int(CPU.knee))

# %% [markdown]
# ## Is it all true?

# %%
if viz.as_delivered("08", globals()):
    assert 100 < ratio < 1000 and lost["GPTQ"][-1] < lost["RTN"][-1] / 2 and further > 1
    assert same and curves[0, 0] > 0.9 and curves[-1].max() < 0.2
    assert all(a >= b - 0.02 for a, b in zip(curves[:, 0], curves[1:, 0], strict=False)), "the more in common, the better"
    assert mean_of_order["strongest first"] < mean_of_order["as they come"] < mean_of_order["weakest first"]
    assert growth[2][0] == 1.0 and growth[2][-1] > 1.5 > 1.2 > growth[3][-1] > growth[4][-1]
    assert points[2, -1] > points[3, -1] > points[4, -1] and points[4, 8] < points[4, -1] < points[3, 8]
    assert learnt[0.01][-1] < learnt[0.01][0] and overfitted > 1.1 > 1 > learnt[0.0001][-1]
    assert words == [f"{sum(int(v) << 4 * i for i, v in enumerate(row)):08X}" for row in quantized.levels.tolist()]
    assert tokens["auto"] == tokens["dequantize"]
    assert sizes[8] > sizes[4] > sizes[2] and moved[8] < moved[4] < moved[2]
    assert all(entry.error < entry.rtn_error for entry in errors[4] + errors[2])
    assert WEIGHTS == 106_168_320 and crossover == 10 and round(gain, 1) == 3.6
    print("all true: the error is less where inputs have something in common, and running it loses nothing")
