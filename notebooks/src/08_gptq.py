# %% [markdown]
# # 08 · Four bits per weight: GPTQ
#
# Rounding a weight to one of 16 levels makes an error. GPTQ lets the weights that are still free make up for it, and
# how well they can depends on one thing: how much the **inputs** of the layer say the same. Here you turn that, and
# bits, groups, order and calibration, on layers small enough to see; at the end a tiny real model is quantised and run.
# Everything is done by the engine's own quantiser.
#
# *15 minutes. To read with it: `docs/learn/07_gptq_quantization.md` and `folovllm/quantize/gptq.py`.*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import contextlib
import io
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")

import torch
from matplotlib import pyplot as plt

from folovllm import viz
from folovllm.csrc.build import load_ops
from folovllm.gptq_config import GPTQConfig
from folovllm.quantize.gptq import GPTQ, Hessian, output_error, rtn_quantize
from folovllm.quantize.grid import Grid
from tests.m7.example_layer import example_layer

viz.style()
torch.set_num_threads(1)
with contextlib.redirect_stderr(io.StringIO()):
    load_ops()  # the C++ kernels: built here if this machine has not got them yet, half a minute

# %% [markdown]
# ## What you can turn

# %%
BITS, GROUP = 4, 32
INPUTS, OUTPUTS, TOKENS = 96, 48, 1500
CORRELATION = 0.8  # how much the inputs share: 0 nothing, 1 everything
SEEDS = range(3 if FAST else 10)
COLOURS = dict(zip(["nearest", "GPTQ", "act-order"], viz.PALETTE, strict=False))

# %% [markdown]
# ## The grid
#
# One group of weights, and the levels it may take. The grid reaches as far as the largest weight: the more bits, the
# denser; the more weights share one grid, the likelier is a large one among them.

# %%
weights = torch.randn(1, 64, generator=torch.Generator().manual_seed(2))


def rounding_error(bits, sym=True):
    grid = Grid.find(weights, GPTQConfig(bits, sym=sym))
    return float(((weights - grid.values(grid.levels(weights))) ** 2).mean())


figure, axes = plt.subplots(1, 3, figsize=(10, 1.6), sharey=True)
for ax, bits in zip(axes, (2, 3, 4), strict=True):
    grid = Grid.find(weights, GPTQConfig(bits))
    values = grid.values(torch.arange(2**bits).float()[None])[0].tolist()
    ax.vlines(values, 0, 1, color=viz.NOBODY)
    ax.plot(weights[0], [0.5] * 64, "|", ms=18, color=viz.PALETTE[0])
    ax.set(title=f"{bits} bits: {2**bits} levels, mean squared error {rounding_error(bits):.4f}", yticks=[])

# %%
ratio = rounding_error(4) / rounding_error(8)
viz.predict(
    "From 4 bits to 8 the steps become 17 times smaller (15 of them before, 255 now). And the squared error?",
    ["about 17 times", "about 290 times"],
    "about 290 times" if ratio > 100 else "about 17 times",
    f"It goes with the square of the step, a quarter for every bit: 17 x 17 = 289. On these 64 weights: {ratio:.0f}.",
)  # fmt: skip

# %% [markdown]
# ## What the inputs say: H
#
# H = X X^T, summed over the tokens of a text. Blue or red beside the diagonal: two inputs that move together or against
# each other, so a weight of one can do the other's work. Left the example of the page, right a random layer with the
# correlation set above.

# %%
def make_inputs(correlation=CORRELATION, seed=0, tokens=TOKENS):
    """[tokens, inputs]: a few shared signals, noise, and inputs of different strength."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(8, INPUTS, generator=generator) / 8**0.5
    strength = torch.rand(INPUTS, generator=generator) * 2 + 0.1
    signals, noise = (torch.randn(tokens, n, generator=generator) for n in (8, INPUTS))
    return (correlation**0.5 * (signals @ mixing) + (1 - correlation) ** 0.5 * noise) * strength


def hessian_of(x):
    hessian = Hessian(x.shape[1])
    hessian.add(x)
    return hessian.matrix


def make_weight(seed=0):
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(100 + seed))


figure, axes = plt.subplots(1, 2, figsize=(7, 2.8))
for ax, h, title in (
    (axes[0], example_layer()[1], "8 inputs"), (axes[1], hessian_of(make_inputs()), f"{INPUTS} inputs"),
):  # fmt: skip
    scale = h.diagonal().sqrt()
    image = ax.imshow(h / scale[:, None] / scale, cmap="RdBu", vmin=-1, vmax=1)
    ax.set(title=f"H of {title}, as correlations", xlabel="input", ylabel="input")
figure.colorbar(image, ax=axes);

# %% [markdown]
# ## Column by column
#
# The layer of the page, 3 bits. What one row becomes, and what is lost of *all* outputs after every column: for
# rounding to nearest nothing is ever given back.

# %%
weight, hessian = example_layer()
config = GPTQConfig(3)
gptq = GPTQ(config)
grid, root, work, plain = Grid.find(weight, config), gptq.damped_root(hessian), weight.clone(), weight.clone()
rows, lost = [], {"nearest": [0.0], "GPTQ": [0.0]}
for i in range(8):
    gptq.step(work, i, grid.values(grid.levels(work[:, i])), root)
    plain[:, i] = grid.values(grid.levels(weight[:, i]))
    lost["GPTQ"].append(100 * output_error(weight, work, hessian))
    lost["nearest"].append(100 * output_error(weight, plain, hessian))
    rows.append([f"column {i}", *(f"{v:.2f}" + ("" if j > i else " *") for j, v in enumerate(work[2].tolist()))])
viz.table(["row 2 after", *map(str, range(8))], rows)

# %%
figure, ax = plt.subplots(figsize=(7, 2.4))
for name, values in lost.items():
    ax.plot(range(9), values, "o-", ms=4, color=COLOURS[name], label=name)
ax.set(xlabel="columns rounded", ylabel="% of the squared output lost")
ax.legend();

# %%
further = float(((weight - work) ** 2).sum() / ((weight - plain) ** 2).sum())
viz.predict(
    "Compare the weights themselves, not the outputs: whose are further from the original ones?",
    ["nearest's", "GPTQ's"], "GPTQ's" if further > 1 else "nearest's",
    f"{further:.2f} times the squared distance. Nearest is the best there is for weights; nobody looks at weights.",
)  # fmt: skip

# %% [markdown]
# ## When can it help?
#
# The same layer, with inputs that share more and more. What is left of the error that rounding to nearest makes?

# %%
def relative_errors(correlation, seed, bits=BITS, group=GROUP):
    """Errors of GPTQ and of GPTQ with act-order, in units of that of rounding to nearest."""
    weight, h = make_weight(seed), hessian_of(make_inputs(correlation, seed))
    nearest = output_error(weight, rtn_quantize(weight, GPTQConfig(bits, group)).dequantize(), h)
    configs = [GPTQConfig(bits, group, desc_act=order) for order in (False, True)]
    return [output_error(weight, GPTQ(c).quantize(weight, h).dequantize(), h) / nearest for c in configs]


def mean_over_seeds(correlation, **settings):
    found = torch.tensor([relative_errors(correlation, seed, **settings) for seed in SEEDS])
    return found.mean(0).tolist()


shares = [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99]
curves = torch.tensor([mean_over_seeds(share) for share in shares])
figure, ax = plt.subplots(figsize=(7, 2.6))
ax.axhline(1, color=COLOURS["nearest"], label="nearest")
for column, name in enumerate(("GPTQ", "act-order")):
    ax.plot(shares, curves[:, column], "o-", ms=4, color=COLOURS[name], label=name)
ax.set(xlabel="correlation of the inputs", ylabel="error / nearest's error", ylim=(0, 1.1))
ax.legend();

# %%
independent = torch.diag(torch.linspace(1, 5, INPUTS))  # H of inputs that have nothing to do with each other
same = torch.equal(
    GPTQ(GPTQConfig(BITS, GROUP)).quantize(make_weight(), independent).levels,
    rtn_quantize(make_weight(), GPTQConfig(BITS, GROUP)).levels,
)
viz.predict(
    "And with inputs that are not correlated at all, H exactly diagonal: what does GPTQ do?",
    ["better than nearest all the same", "exactly rounding to nearest"],
    "exactly rounding to nearest" if same else "better than nearest all the same",
    "No input can do another's work, so there is nothing to move. What GPTQ knows about a layer is what its inputs "
    "have in common.",
)  # fmt: skip

# %% [markdown]
# ## In which order?
#
# Columns that come late have few left to make up for them. So whose turn should be last?

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
viz.table(["order", "error / nearest's"], [[name, value] for name, value in mean_of_order.items()])

# %%
viz.predict(
    "Act-order takes the strongest inputs first. What if one takes the weakest first?",
    ["no difference", "worse than any order", "better still"],
    "worse than any order" if max(mean_of_order, key=mean_of_order.get) == "weakest first" else "no difference",
    "Then the strong inputs come last, where nobody is left to help, and their errors cost most.",
)  # fmt: skip

# %% [markdown]
# ## Bits and groups: what does a weight cost, and what does it buy?
#
# Each group brings a scale of 16 bits and a zero. Below: the error against the *real* number of bits per weight.

# %%
def bits_per_weight(bits, group):
    return bits + (16 + bits) / (INPUTS if group == -1 else group)


points = {}
for bits in (2, 3, 4):
    for group in (-1, 96, 48, 32, 16, 8):
        w, h = make_weight(), hessian_of(make_inputs())
        points[bits, group] = 100 * output_error(w, GPTQ(GPTQConfig(bits, group)).quantize(w, h).dequantize(), h)
figure, ax = plt.subplots(figsize=(7, 2.8))
for bits, colour in zip((2, 3, 4), viz.PALETTE, strict=False):
    chosen = [group for b, group in points if b == bits]
    x = [bits_per_weight(bits, group) for group in chosen]
    ax.plot(x, [points[bits, group] for group in chosen], "o-", ms=4, color=colour, label=f"{bits} bits")
    for group, at in zip(chosen[1:], x[1:], strict=True):
        ax.annotate(str(group), (at, points[bits, group]), textcoords="offset points", xytext=(3, 4), size=7)
ax.set(xlabel="bits per weight, scales and zeros counted (at the points: group size)", ylabel="% lost", yscale="log")
ax.legend();

# %%
viz.predict(
    "3 bits in groups of 8 cost 5.4 bits per weight, 4 bits in one group 4.2. Which loses less?",
    ["3 bits in groups of 8", "4 bits in one group"],
    "4 bits in one group" if points[4, -1] < points[3, 8] else "3 bits in groups of 8",
    f"{points[4, -1]:.2f} % against {points[3, 8]:.2f} % here: small groups are an expensive way to buy accuracy.",
)  # fmt: skip

# %% [markdown]
# ## How much text does it need?
#
# H is estimated from calibration tokens. Error on *other* tokens of the same kind, against how many were seen: with
# fewer tokens than inputs H is singular, and only damping saves the day.

# %%
counts = [16, 48, 96, 192, 400, 1500]
held_out = hessian_of(make_inputs(tokens=6000)[3000:])
w = make_weight()
nearest = output_error(w, rtn_quantize(w, GPTQConfig(BITS, GROUP)).dequantize(), held_out)
learnt = {}
for damp in (0.0001, 0.01, 0.1):
    learnt[damp] = []
    for count in counts:
        h = hessian_of(make_inputs(tokens=6000)[:count])
        quantized = GPTQ(GPTQConfig(BITS, GROUP), damp).quantize(w, h)
        learnt[damp].append(output_error(w, quantized.dequantize(), held_out) / nearest)
figure, ax = plt.subplots(figsize=(7, 2.6))
for (damp, values), colour in zip(learnt.items(), viz.PALETTE, strict=False):
    ax.plot(counts, values, "o-", ms=4, color=colour, label=f"damp {damp:g}")
ax.axhline(1, color=viz.INK, lw=0.8, ls=":")
ax.axvline(INPUTS, color=viz.INK, lw=0.8, ls=":")
ax.set(xscale="log", xlabel=f"calibration tokens (dotted: {INPUTS} inputs)", ylabel="error / nearest's, held out")
ax.legend();

# %%
viz.predict(
    "16 calibration tokens for 96 inputs, and little damping. Is GPTQ then better than rounding to nearest?",
    ["yes", "no"], "yes" if learnt[0.0001][0] < 1 else "no",
    "It makes up for errors as 16 tokens tell it to, and moves weights where those tokens say nothing. On other text "
    "that goes wrong. More damping means moving less.",
)  # fmt: skip

# %% [markdown]
# ## What lies in the file
#
# Eight inputs of one output are one word of `qweight`; read the hexadecimal digits from the right.

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
# Two layers of random weights, quantised with `quantize_checkpoint`. It reports each linear layer's error beside that
# of rounding to nearest; `folovllm quantize` shows the same in its progress bar.

# %%
from folovllm import LLM, SamplingParams
from folovllm.quantize.perplexity import engine_scorer
from folovllm.quantize.quantizer import QuantizeSettings, quantize_checkpoint
from tests.m7.quant_helpers import make_quantizable, random_windows

scratch = tempfile.TemporaryDirectory()
with contextlib.redirect_stderr(io.StringIO()):
    source = make_quantizable("Llama", Path(scratch.name) / "plain")
folders, errors = {}, {}
for bits in (8, 4, 2):
    folders[bits] = Path(scratch.name) / f"q{bits}"
    settings = QuantizeSettings(GPTQConfig(bits, 32))
    errors[bits] = quantize_checkpoint(source, folders[bits], settings, random_windows(), progress=False)
viz.table(
    ["layer", "linear", "% lost, nearest", "% lost, GPTQ"],
    [[str(e.layer), e.linear, f"{100 * e.rtn_error:.3f}", f"{100 * e.error:.3f}"] for e in errors[4]],
)  # fmt: skip

# %% [markdown]
# First question: how far do the log probabilities of a text move? Random weights have no opinion on anything, so every
# touch moves them far, and what their inputs share is little; trained models are tougher in both ways.

# %%
text = torch.randint(3, 250, (200,), generator=torch.Generator().manual_seed(5)).tolist()


def score(folder):
    return engine_scorer(folder, quantization="auto")(text, 1)


truth = score(source)
moved = {bits: float((score(folder) - truth).abs().mean()) for bits, folder in folders.items()}
sizes = {bits: sum(file.stat().st_size for file in folder.glob("model-0000[23]*")) for bits, folder in folders.items()}
viz.table(
    ["bits", "mean change of log p", "both layers in the file, bytes"],
    [[bits, moved[bits], f"{sizes[bits]:,}"] for bits in sizes],
)  # fmt: skip

# %% [markdown]
# Second question, often mixed up with the first: *quantising* changes answers, of course. Does *running* packed
# weights?

# %%
prompts = [{"prompt_token_ids": [3 + (7 * i + k) % 200 for k in range(12)]} for i in range(4)]
params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
with contextlib.redirect_stderr(io.StringIO()):
    tokens = {}
    for quantization in ("auto", "dequantize"):
        llm = LLM(str(folders[4]), dtype="float32", max_model_len=64, quantization=quantization)
        answers = llm.generate(prompts, params, use_tqdm=False)
        tokens[quantization] = [tuple(answer.outputs[0].token_ids) for answer in answers]
viz.predict(
    "48 greedy tokens of the packed 4-bit checkpoint, and of the same one dequantised: how many are equal?", None,
    sum(a == b for pair in zip(*tokens.values(), strict=True) for a, b in zip(*pair, strict=True)),
    "The file is what is lossy. Running it is exact, up to the order of sums.",
)  # fmt: skip

# %% [markdown]
# ## Where are four bits slower?
#
# Reading against multiplying, for the linear layers of a model. Turn the machine: two cores of the development machine
# read 39 GB/s and multiply 0.85 T/s in bf16; an A100 reads 2 TB/s and multiplies 312 T/s.

# %%
WEIGHTS, UNPACKING = 106e6, 1.18  # SmolLM2-135M; work per weight with 4 bits, in units of bf16's (the page counts it)
MACHINES = {"2 cores": (39e9, 0.85e12), "A100": (2e12, 312e12)}


def milliseconds(rows, bits, machine):
    read, multiply = MACHINES[machine]
    work = (UNPACKING if bits < 16 else 1) * 2 * WEIGHTS * rows / multiply
    return 1e3 * max(WEIGHTS * bits / 8 / read, work)


crossovers = {}
figure, axes = plt.subplots(1, 2, figsize=(10, 2.6))
for ax, machine in zip(axes, MACHINES, strict=True):
    rows = range(1, 400)
    for bits, colour in ((16, viz.PALETTE[0]), (4.5, viz.PALETTE[5])):
        ax.loglog(rows, [milliseconds(n, bits, machine) for n in rows], color=colour, label=f"{bits} bits")
    crossovers[machine] = max(n for n in rows if milliseconds(n, 4.5, machine) <= milliseconds(n, 16, machine))
    ax.axvline(crossovers[machine], color=viz.INK, lw=0.8, ls=":")
    ax.set(title=f"{machine}: 4 bits win up to {crossovers[machine]} tokens", xlabel="tokens at once", ylabel="ms")
axes[0].legend();

# %%
gain = milliseconds(1, 16, "2 cores") / milliseconds(1, 4.5, "2 cores")
viz.predict(
    "One token on two cores: how many times faster are these layers with 4.5 bits per weight?", None, round(gain, 1),
    "16 / 4.5: nothing but reading counts. The head, attention and Python stay, so the whole token gains less.",
)  # fmt: skip

# %% [markdown]
# ## Is it all true?

# %%
assert 100 < ratio < 1000 and lost["GPTQ"][-1] < lost["nearest"][-1] / 2 and further > 1
assert same and curves[0, 0] > 0.9 and curves[-1].max() < 0.2
assert all(a >= b - 0.02 for a, b in zip(curves[:, 0], curves[1:, 0], strict=False)), "the more in common, the better"
assert mean_of_order["strongest first"] < mean_of_order["as they come"] < mean_of_order["weakest first"]
assert points[2, -1] > points[3, -1] > points[4, -1] and points[4, 8] < points[4, -1] < points[3, 8]
assert learnt[0.01][-1] < learnt[0.01][0] and learnt[0.0001][0] > 1 > learnt[0.0001][-1]
assert words == [f"{sum(int(v) << 4 * i for i, v in enumerate(row)):08X}" for row in quantized.levels.tolist()]
assert tokens["auto"] == tokens["dequantize"]
assert sizes[8] > sizes[4] > sizes[2] and moved[8] < moved[4] < moved[2]
assert all(entry.error < entry.rtn_error for entry in errors[4] + errors[2])
assert crossovers["2 cores"] == 18 and round(gain, 1) == 3.6
print("all true: the error is less where inputs have something in common, and running it loses nothing")
