# %% [markdown]
# # 02 · Why decode is slow: the roofline
#
# A processor that can do hundreds of billions of operations per second needs several milliseconds for *one* token of a
# small model. 32 tokens for 32 people do not take 32 times as long. And a prompt of 64 tokens is done in the time of a few
# generated ones. One picture with two lines explains all three: the **roofline**. You predict with the two lines of the
# reference machine, measure those of your own, and let the engine try.
#
# *30 minutes. Read [learn/01](../docs/learn/01_basic_inference.md) first and, later, [learn/04](../docs/learn/04_flash_attention.md).
# **Predict** asks before an experiment, and **Answer** follows it; `viz.ask("02.1", guess=2)` has your guess judged.
# Next: [03](03_scheduler_gantt.ipynb).*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import contextlib
import dataclasses
import io
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")  # no ipywidgets, or no C++ compiler: nothing here needs them

import torch
from matplotlib import pyplot as plt

from folovllm import LLM, SamplingParams, viz
from folovllm.config import KernelConfig
from folovllm.csrc.build import load_ops
from folovllm.learn.three_requests import example_core, run_example
from folovllm.model_executor.cpu.accelerate import accelerate
from folovllm.model_executor.cpu.huge_pages import huge_zeros
from folovllm.model_executor.model_loader import random_model
from folovllm.model_shapes import shape_architecture, shape_config
from folovllm.platforms import has_native_bf16
from folovllm.sim.cost import Calibration, CostModel
from folovllm.sim.hardware import HARDWARE

viz.style()
with contextlib.redirect_stderr(io.StringIO()):
    load_ops()  # the C++ kernels: built here if this machine has not got them yet, half a minute
CPU = torch.device("cpu")
DTYPE = torch.bfloat16 if has_native_bf16("cpu") else torch.float32  # what the engine would choose here
arch = shape_architecture("smollm2-135m")
REFERENCE, H100 = HARDWARE["cpu"], HARDWARE["h100"]  # the reference machine of the course, and a data sheet

# %% [markdown]
# ## What you can change

# %%
THREADS = 1  # for your machine; alone on it, try all cores
BATCHES = (1, 8, 32, 128)  # sequences that decode together
CONTEXT = 256  # tokens that each of them has in its KV cache
PROMPTS = (64, 512)  # tokens of a prompt
TOKENS = (1, 2, 4, 8, 16, 32) if FAST else (1, 2, 4, 8, 16, 32, 64, 128, 256)  # for the measurement below
LAYERS = 2 if FAST else arch.num_hidden_layers  # of the model that is measured
torch.set_num_threads(THREADS)

# %% [markdown]
# ## Two numbers of a machine
#
# How many bytes per second come out of memory, and how many operations per second do the arithmetic units do? (A *FLOP* is a
# floating-point operation, one multiplication or one addition, and a GFLOP is a billion of them.)

# %%
viz.table(
    ["machine", "GFLOP/s", "GB/s"],
    [[m.name, round(m.flops / 1e9), round(m.gb_per_s, 1)] for m in (REFERENCE, H100, HARDWARE["rtx4090"])],
)

# %% [markdown]
# The first number divided by the second is the **knee**: while one byte arrives, that many operations could be done. Work that does
# *fewer* operations per byte waits for memory, whatever the code. Work that does *more* waits for the arithmetic units. This
# property of a piece of work is its **arithmetic intensity** (operations per byte moved):
#
#     seconds >= max(operations / peak, bytes / bandwidth)
#
# ## The three requests
#
# a (5 prompt tokens), b (4) and c (12, it arrives before step 2) run together. Two steps of theirs: step 1 computes one
# token of a and one of b; step 2 computes one of a, one of b, and the 12 of c's prompt. The model is SmolLM2-135M in bf16,
# 134.5 M weights.

# %%
viz.ask("02.1")

# %%
roofline = CostModel(arch, REFERENCE, Calibration(1.0, 0.0, "peak rates, no overhead"))
three_steps = list(run_example(example_core(num_kv_blocks=10)))
costs = [
    roofline.step([(s.start[r], n) for r, n in s.scheduled.items()], sum(bool(t) for t in s.sampled.values()))
    for s in three_steps
]

# %%
viz.table(
    ["step", "tokens", "GFLOP", "MB", "ms computing", "ms reading", "waits for"],
    [
        [s.number, sum(s.scheduled.values()), round(c.flops / 1e9, 2), round(c.bytes / 1e6, 1), round(1e3 * c.compute, 1),
         round(1e3 * c.memory, 1), c.bound]
        for s, c in zip(three_steps, costs)
    ],
)  # fmt: skip

# %%
viz.answer("02.1", costs[2].seconds / costs[1].seconds)

# %% [markdown]
# All six steps wait for memory and take the same 7.8 ms. That is why requests share steps: one after the other, the
# three requests need 12 steps.
#
# ## The intensity of a linear layer
#
# `y = x W` with T tokens: `x [T, in]`, `W [in, out]`. Operations: a multiplication and an addition for each token and
# weight. Bytes: the weights once, and x and y.

# %%
viz.ask("02.2")

# %%
B = 2  # bytes per number: bf16


def linear(tokens, inputs, outputs):
    """Operations and bytes of one linear layer."""
    return 2 * tokens * inputs * outputs, B * inputs * outputs + B * tokens * (inputs + outputs)


LINEARS = {
    "qkv_proj": (arch.hidden_size, arch.q_size + 2 * arch.kv_size),
    "o_proj": (arch.q_size, arch.hidden_size),
    "gate_up_proj": (arch.hidden_size, 2 * arch.intermediate_size),
    "down_proj": (arch.intermediate_size, arch.hidden_size),
}
HEAD = (arch.hidden_size, arch.vocab_size)


def intensity(work):
    operations, num_bytes = work
    return operations / num_bytes


one = intensity(linear(1, *HEAD))

# %%
viz.answer("02.2", one)

# %%
viz.ask("02.3")

# %%
viz.table(
    ["layer", "in", "out", *(f"T = {t}" for t in (1, 8, 32, 512))],
    [
        [name, *size, *(round(intensity(linear(t, *size)), 1) for t in (1, 8, 32, 512))]
        for name, size in (LINEARS | {"lm_head": HEAD}).items()
    ],
)

# %%
knee = H100.flops / H100.bandwidth * B / 2  # two operations for each weight of B bytes
viz.answer("02.3", knee)

# %% [markdown]
# (At T = 512 the intensity is below 512, because x and y are no longer small beside the weights.)
#
# ### Your turn: the knee in tokens
#
# From how many tokens per step on does a machine wait for arithmetic? Only the weights count as bytes here. Weights may
# have 2 bytes (bf16), 1 (8 bits) or 0.5 (4 bits).

# %%
def knee_in_tokens(peak, bandwidth, bytes_per_weight):
    """`peak` is in FLOP/s, `bandwidth` in bytes/s."""
    return None  # your code

# %%
def knee_by_search(peak, bandwidth, bytes_per_weight):
    """The number of tokens at which a weight is computed for as long as it is read, by halving an interval."""
    low, high = 0.0, 1e6
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if 2 * middle / peak < bytes_per_weight / bandwidth else (low, middle)
    return low


KNEES = [(m.flops, m.bandwidth, size) for m in (REFERENCE, H100) for size in (2, 1, 0.5)]
viz.your_turn("02.t1", knee_in_tokens, [(case, knee_by_search(*case)) for case in KNEES])

# %% [markdown]
# ## A whole step
#
# A step computes T tokens. The linear layers see T rows. The *head*, the output matrix that makes logits, sees only the rows that
# sample. Attention is different: each
# sequence reads **its own** K and V, so a larger batch does not raise the intensity of attention. This function of the
# engine's simulator counts a step:

# %%
viz.source(CostModel.step)

# %%
weights_bytes, kv_bytes = B * arch.num_parameters(), arch.kv_bytes_per_token(B)

# %%
viz.ask("02.4", weights=weights_bytes / 1e6, kv_bytes=kv_bytes)

# %%
def step(sequences, new, context):
    """A step with `new` tokens for each of `sequences`, with `context` tokens in its cache afterwards."""
    return roofline.step([(context - new, new)] * sequences, sequences)


crossing = round(weights_bytes / kv_bytes, -2)

# %%
viz.answer("02.4", crossing, each=crossing / 32)

# %%
viz.ask("02.5")

# %%
TOKENS_OF = {f"decode, batch {n}": n for n in BATCHES} | {"decode, 32 x 4,096": 32} | {f"prompt of {n}": n for n in PROMPTS}
WORK = {f"decode, batch {n}": step(n, 1, CONTEXT) for n in BATCHES}
WORK |= {"decode, 32 x 4,096": step(32, 1, 4096)}
WORK |= {f"prompt of {n}": step(1, n, n) for n in PROMPTS}
groups = json.loads((ROOT / "milestones/m5/results/long_prompts_cpu.json").read_text())["arms"]["m4"]["modes"]["batch"]["groups"]
MEASURED = [  # on the reference machine, engine as of M4: 8 decodes of about 200 tokens, and these with a prompt of 4,000
    ("8 decodes", roofline.step([(200, 1)] * 8, 8), groups["decoding"]["itl_ms"]["p50"] / 1e3),
    ("8 decodes and a prompt of 4,000", roofline.step([(200, 1)] * 8 + [(0, 4000)], 9), groups["decoding"]["itl_ms"]["p99"] / 1e3),
]
ratio = step(32, 1, 256).seconds / step(1, 1, 256).seconds

# %%
figure, ax = plt.subplots(figsize=(10, 5))
for machine, style in ((REFERENCE, "-"), (H100, "--")):
    top, slope, knee = machine.flops, machine.bandwidth, machine.knee
    ax.plot([0.3, knee, 6000], [0.3 * slope / 1e9, top / 1e9, top / 1e9], style, color=viz.INK, lw=1.4)
    name = f"{machine.name}: {slope / 1e9:,.4g} GB/s, {top / 1e9:,.0f} GFLOP/s"
    ax.annotate(name, (5000, top / 1e9), (-4, 5), textcoords="offset points", ha="right")
on_roof = [name for name, cost in WORK.items() if cost.bound == "compute"]
for name, cost in WORK.items():
    x, y = cost.flops / cost.bytes, cost.flops / cost.seconds / 1e9
    colour = viz.PALETTE[2] if "prompt" in name else viz.PALETTE[5] if "4,096" in name else viz.PALETTE[0]
    ax.plot(x, y, "o", color=colour)
    label = f"{name} ({x:.1f})"
    if name in on_roof:  # below the roof, on a line of its own
        below = 18 * 1.9 ** on_roof.index(name)
        ax.plot([x, x], [below, y], color=colour, lw=0.7)
        ax.annotate(label, (x, below), (3, -3), textcoords="offset points", color=colour)
    else:
        place = (8, -12) if x < 2 else (-8, 16 if x > 6 else 4)
        ax.annotate(label, (x, y), place, textcoords="offset points", color=colour, ha="left" if x < 2 else "right")
for name, cost, seconds in MEASURED:
    x, y = cost.flops / cost.bytes, cost.flops / seconds / 1e9
    ax.plot(x, y, "s", mfc="none", mec=viz.INK, ms=7)
    ax.annotate(name, (x, y), (6, -14), textcoords="offset points", color=viz.INK, ha="right" if x > 1000 else "left")
ax.set(xscale="log", yscale="log", xlabel="arithmetic intensity: FLOP per byte (the number in brackets)", ylabel="GFLOP/s",
       title="steps of SmolLM2-135M under the roof of the reference machine: dots at best, squares measured",
       xlim=(0.3, 6000), ylim=(8, 3e6))  # fmt: skip
ax.grid(alpha=0.25);

# %%
viz.answer("02.5", ratio)

# %%
viz.table(
    ["step", "GFLOP", "MB", "FLOP/byte", "waits for", "ms at least", "tokens/s at most", "on an H100: ms"],
    [
        [name, round(c.flops / 1e9, 2), round(c.bytes / 1e6), round(c.flops / c.bytes, 1), c.bound, round(1e3 * c.seconds, 2),
         round(TOKENS_OF[name] / c.seconds),
         round(1e3 * max(c.flops / H100.flops, c.bytes / H100.bandwidth), 3)]
        for name, c in WORK.items()
    ],
)  # fmt: skip

# %% [markdown]
# The squares are the real engine: a step of 8 decodes, and the same with a prompt of 4,000 tokens
# ([measured in M5](../docs/learn/05_chunked_prefill.md)). They are near the roof, and nothing is above it.
#
# Look at the two decodes of 32. With long contexts the bytes are no longer weights but K and V, which are not shared
# within the batch: the point moves *down* the slope again.
#
# ### Your turn: more K and V than weights
#
# How many sequences with 1,000 tokens each can decode together before the K and V that a step reads are more than the
# weights that it reads? Use `weights_bytes` and `kv_bytes`, and round down.

# %%
my_sequences = None  # a number, or code

# %%
empty = step(1, 1, 1).bytes  # the weights, and one token
viz.your_turn("02.t2", my_sequences, max(n for n in range(1, 100) if step(n, 1, 1000).bytes - empty < empty))

# %% [markdown]
# ## Your machine
#
# Now we measure the same two numbers on the machine that runs this notebook. Adding up an array far larger than any cache shows how fast
# memory is, and multiplying two matrices that fit into a cache shows how fast arithmetic is. The best of several tries
# counts, because whatever disturbs a try makes it slower. All that follows depends on these two numbers, so they are measured again
# after each experiment, and the better value is used.

# %%
def best_seconds(work, tries=3 if FAST else 7):
    """The shortest of several runs, after one that warms up; no more of them once a second is spent."""
    work()
    seconds = []
    while len(seconds) < tries and sum(seconds) < 1:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


PEAK_TRIES = 3 if FAST else 60  # enough to find a quiet moment
big = huge_zeros(((8 if FAST else 256) * 2**20 // 4,), torch.float32).fill_(1.0)  # 256 MiB, in huge pages as our weights
n = 256 if FAST else 1024
a, b = torch.randn(n, n).to(DTYPE), torch.randn(n, n).to(DTYPE)


def measure_here(before=None):
    """The two numbers of this machine, the better ones of now and `before`."""
    flops, bandwidth = 2 * n**3 / best_seconds(lambda: a @ b, PEAK_TRIES), big.nbytes / best_seconds(big.sum, PEAK_TRIES)
    if before:
        flops, bandwidth = max(flops, before.flops), max(bandwidth, before.bandwidth)
    name = f"here, {THREADS} thread" + "s" * (THREADS > 1)
    return dataclasses.replace(REFERENCE, name=name, flops=flops, bandwidth=bandwidth)


HERE = measure_here()
HERE_BYTES = DTYPE.itemsize
viz.table(
    ["machine", "GFLOP/s", "GB/s", "FLOP per byte"],
    [[m.name, round(m.flops / 1e9), round(m.gb_per_s, 1), round(m.knee)] for m in (HERE, REFERENCE)],
)

# %% [markdown]
# ## Is a model of two lines any good?
#
# Linears of the real size with random weights (speed does not depend on values), as the engine runs them: packed for the
# processor, C++ where there is a compiler. The prediction needs only the two numbers just measured.

# %%
small = dataclasses.replace(arch, num_hidden_layers=LAYERS, vocab_size=1024)
model = random_model(small, DTYPE, CPU)
accelerate(model, None, KernelConfig(linear_backend="auto", fused_mlp="auto", huge_pages=True))
layers = model.model.layers


def run_linears(hidden):
    """Every matrix of every layer once; what lies between them is left out (except SiLU, where gate_up does it itself)."""
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        hidden = attention.o_proj(attention.qkv_proj(hidden)[:, : arch.q_size])
        hidden = mlp.down_proj(mlp.gate_up_proj(hidden)[:, : arch.intermediate_size])
    return hidden


def predicted_seconds(tokens):
    operations, num_bytes = (LAYERS * sum(x) for x in zip(*(linear(tokens, *size) for size in LINEARS.values())))
    return max(operations / HERE.flops, num_bytes * HERE_BYTES / B / HERE.bandwidth)


with torch.inference_mode():
    inputs = {t: torch.randn(t, arch.hidden_size).to(DTYPE) for t in TOKENS}
    measured = [best_seconds(lambda t=t: run_linears(inputs[t])) for t in TOKENS]
    last = run_linears(inputs[TOKENS[-1]])
HERE = measure_here(HERE)
predicted = [predicted_seconds(t) for t in TOKENS]

# %%
viz.ask("02.6")

# %%
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharex=True)
for ax, per_token in ((left, False), (right, True)):
    for values, style, colour in ((predicted, "--", viz.PALETTE[5]), (measured, "o-", viz.PALETTE[0])):
        ys = [1e3 * s / (t if per_token else 1) for t, s in zip(TOKENS, values)]
        ax.plot(TOKENS, ys, style, color=colour, ms=4)
    ax.set(xscale="log", yscale="log", xlabel="tokens in the step")
    ax.set_xticks(TOKENS, TOKENS)
    ticks = [t for t in (1, 2, 4, 8, 16) if t < 1.2e3 * measured[0]] if per_token else [3, 10, 30, 100, 300]
    ax.set_yticks(ticks, ticks)
    ax.minorticks_off()
    ax.grid(alpha=0.25)
left.set(ylabel="ms", title=f"linears of {LAYERS} layers: dots measured, dashes predicted")
right.set(ylabel="ms per token", title="the same, for each token");

# %%
at_16 = min(range(len(TOKENS)), key=lambda i: abs(TOKENS[i] - 16))
viz.answer("02.6", measured[at_16] / measured[0])

# %% [markdown]
# Dots above the dashed line? No program reaches both peaks all the time, and other programs on the machine cost time, too. Dots below
# it? Then something disturbed the measurement of the two peaks. (With 2 layers, which have 14 MB of weights, the weights may
# also come from a cache, and the line assumes main memory.)
#
# ## Tokens per second
#
# At last the whole engine, on a model of this shape with random weights: attention, norms, scheduler, sampler and all. The
# roofline says what the two lines allow. The share of it that the engine reaches says how good the engine is.
#
# The cell after the question makes an engine with random weights (`load_format="dummy"`). `tokens_per_second` times `generate` for some
# requests at once, and `roofline_of` adds up the modelled steps of the same requests: one for the prompts, and one for each
# further token.

# %%
served = (1, 4) if FAST else (1, 8, 32)  # requests at once

# %%
viz.ask("02.7", num_requests=served[1])

# %%
VOCAB, PROMPT, OUTPUT = (1024, 8, 4) if FAST else (arch.vocab_size, 32, 16)
shape = dataclasses.replace(arch, num_hidden_layers=LAYERS, vocab_size=VOCAB)
scratch = tempfile.TemporaryDirectory()
config = shape_config("smollm2-135m") | {"num_hidden_layers": LAYERS, "vocab_size": VOCAB}
Path(scratch.name, "config.json").write_text(json.dumps(config))
llm = LLM(
    scratch.name, preset="m4", max_model_len=128, num_kv_blocks=300, device="cpu", load_format="dummy",
    skip_tokenizer_init=True,
)  # fmt: skip
greedy = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False)


def tokens_per_second(batch):
    """Generated tokens per second of `batch` requests at once, their (short) prompts included."""
    prompts = [{"prompt_token_ids": [(7 * i + j) % VOCAB for j in range(PROMPT)]} for i in range(batch)]
    lengths = []

    def serve():
        lengths.extend(len(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False))

    rate = batch * OUTPUT / best_seconds(serve, tries=2)
    assert set(lengths) == {OUTPUT}
    return rate


def roofline_of(batch):
    """The same from the roofline: the prompts in one step, then one step per token."""
    seconds = here_model.step([(0, PROMPT)] * batch, batch).seconds
    seconds += sum(here_model.step([(PROMPT + i, 1)] * batch, batch).seconds for i in range(OUTPUT - 1))
    return batch * OUTPUT / seconds


rates = [tokens_per_second(n) for n in served]
HERE = measure_here(HERE)
here_model = CostModel(
    shape, HERE, Calibration(1.0, 0.0, "as measured above"), dtype_bytes=HERE_BYTES, weight_bits=8 * HERE_BYTES
)
bounds = [roofline_of(n) for n in served]

# %%
viz.table(
    ["requests at once", "roofline: tokens/s", "measured: tokens/s", "share", "against one request"],
    [
        [n, round(bound), round(rate), f"{rate / bound:.0%}", round(rate / rates[0], 1)]
        for n, bound, rate in zip(served, bounds, rates)
    ],
)

# %%
shares = [rate / bound for rate, bound in zip(rates, bounds)]
if LAYERS > 20:  # few layers fit into a cache
    shares += [at_best / found for at_best, found in zip(predicted, measured)]
if max(shares) > 1.05 and not FAST:
    print(f"{max(shares):.0%} of what is possible: {viz.MEASURE_AGAIN}")

# %%
viz.answer("02.7", rates[1] / rates[0], num_requests=served[1])

# %% [markdown]
# (A share far above 100 %? Then something else used the machine while the two lines were measured. Run it again.)
#
# Below the knee a larger batch costs little, and above it each request waits for the others. To go faster with *one*
# request there are two ways: fewer bytes (4-bit weights: M7), or more tokens per pass over the weights (guess several
# and check them together: speculative decoding).
#
# ### Your turn: four bits
#
# On the reference machine (`REFERENCE.bandwidth`), how many milliseconds does it take at least to read all weights of the
# model (`arch.num_parameters()`), if they have 4 bits instead of 16?

# %%
my_ms = None  # a number, or code

# %%
four_bits = CostModel(arch, REFERENCE, Calibration(1.0, 0.0, "peak rates, no overhead"), weight_bits=4)
viz.your_turn("02.t3", my_ms, 1000 * four_bits.weight_bytes / REFERENCE.bandwidth)

# %%
BITS = (32, 16, 8, 4)
read_ms = {bits: 1e3 * bits / 8 * arch.num_parameters() / REFERENCE.bandwidth for bits in BITS}

# %%
viz.table(
    ["bits per weight", "MB of weights", "ms to read them, reference machine", "tokens/s at most"],
    [[bits, round(bits / 8 * arch.num_parameters() / 1e6), round(ms, 2), round(1e3 / ms)] for bits, ms in read_ms.items()],
)

# %% [markdown]
# ## Is it all true?
#
# What is counted and modelled. What the clock says depends on what else the machine is doing.

# %%
if viz.as_delivered("02", globals()):
    counted = sum(p.numel() for p in random_model(small, DTYPE, CPU).parameters())
    assert counted == small.num_parameters()
    assert sum(i * o for i, o in LINEARS.values()) * 30 + HEAD[0] * HEAD[1] + 61 * 576 == arch.num_parameters() == 134_515_008
    assert abs(intensity(linear(1, 10_000, 10_000)) - 1) < 0.01 and abs(one - 1) < 0.01
    assert 290 < H100.knee < 300 and crossing == 11_700 and 12 < REFERENCE.knee < 13
    assert all(c.bound == "memory" and 7.7 < 1e3 * c.seconds < 7.9 for c in costs) and 2 < ratio < 3.5
    decodes = [WORK[f"decode, batch {n}"] for n in BATCHES]
    intensities = [c.flops / c.bytes for c in decodes]
    assert intensities == sorted(intensities) and intensities[0] < 2, "a larger batch uses each weight more often"
    long_context = WORK["decode, 32 x 4,096"]
    assert long_context.flops / long_context.bytes < (step(32, 1, CONTEXT).flops / step(32, 1, CONTEXT).bytes), "K and V are not shared in a batch"
    assert WORK[f"prompt of {PROMPTS[0]}"].seconds < 8 * decodes[0].seconds, "a prompt costs a few decodes"
    assert last.isfinite().all() and HERE.flops > 0 and HERE.bandwidth > 0
    assert min(measured) > 0 and min(rates) > 0  # how long things take is for you to judge: another program may disturb it
    print(f"all true: here {HERE.gb_per_s:.0f} GB/s, {HERE.flops / 1e9:.0f} GFLOP/s, knee at {HERE.knee:.0f} FLOP per byte")
