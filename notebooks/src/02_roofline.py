# %% [markdown]
# # 02 · Why decode is slow: the roofline
#
# A processor that can do hundreds of billions of operations per second needs several milliseconds for *one* token of a
# small model. Thirty-two tokens for thirty-two people take hardly longer than one. And a prompt of 500 tokens is done in the
# time of a few dozen generated ones. One picture with two lines explains all three: the **roofline**. Here you measure the two
# lines on your machine, place the work of a model under them, predict tokens per second, and then let the engine try.
#
# *10 minutes. To read with it: `docs/learn/04_flash_attention.md`, and "The floor of a decode step" in `docs/learn/01`.*

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
from folovllm.hf_config import parse_hf_config
from folovllm.model_executor.cpu.accelerate import accelerate
from folovllm.model_executor.model_loader import random_model
from folovllm.platforms import has_native_bf16

viz.style()
with contextlib.redirect_stderr(io.StringIO()):
    load_ops()  # the C++ kernels: built here if this machine has not got them yet, half a minute
CPU = torch.device("cpu")
DTYPE = torch.bfloat16 if has_native_bf16("cpu") else torch.float32  # what the engine would choose here
B = DTYPE.itemsize  # bytes per number
arch = parse_hf_config(json.load(open(ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json")))

# %% [markdown]
# ## What you can turn

# %%
THREADS = 1  # with more, whatever else your machine is doing disturbs the measurement; alone on it, try all cores
BATCHES = (1, 8, 32, 128)  # sequences that decode together
CONTEXT = 256  # tokens that each of them has in its KV cache
PROMPTS = (64, 512)  # tokens of a prompt
TOKENS = (1, 2, 4, 8, 16, 32) if FAST else (1, 2, 4, 8, 16, 32, 64, 128, 256)  # for the measurement below
LAYERS = 2 if FAST else arch.num_hidden_layers  # of the model that is measured

# Peak bf16 operations per second (dense) and memory bandwidth, from the makers' data sheets.
DATA_SHEETS = {
    "H100 SXM": (989e12, 3.35e12),
    "A100 80 GB SXM": (312e12, 2.04e12),
    "RTX 4090": (165e12, 1.01e12),
}
torch.set_num_threads(THREADS)

# %% [markdown]
# ## Two numbers of a machine
#
# How fast do bytes come out of memory, and how fast are they multiplied? Add up an array far larger than any cache;
# multiply two matrices that fit into one. The best of several tries counts: whatever disturbs a try makes it slower.


# %%
def best_seconds(work, tries=3 if FAST else 7):
    """The shortest of several runs, after one that warms up; no more of them once two seconds are spent."""
    work()
    seconds = []
    while len(seconds) < tries and sum(seconds) < 2:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


TRIES = 3 if FAST else 60  # of these two all else depends: give them time to find a quiet moment
big = torch.ones((8 if FAST else 256) * 2**20 // 4)  # fp32, 256 MiB
bandwidth = big.nbytes / best_seconds(big.sum, TRIES)  # bytes/s
n = 256 if FAST else 1024
a, b = torch.randn(n, n).to(DTYPE), torch.randn(n, n).to(DTYPE)
peak = 2 * n**3 / best_seconds(lambda: a @ b, TRIES)  # operations/s; a multiply and an add are two
machines = {"here": (peak, bandwidth), **DATA_SHEETS}  # "here": with THREADS threads
viz.table(
    ["machine", "Gflop/s", "GB/s", "flop per byte where the lines meet"],
    [[name, round(p / 1e9), round(w / 1e9), round(p / w)] for name, (p, w) in machines.items()],
)

# %% [markdown]
# The last column is the **knee**: while one byte arrives, that many operations could be done. Work that does *fewer* per
# byte waits for memory, whatever the code; work that does *more* waits for the multipliers. It is the property of a piece
# of work that decides, its **arithmetic intensity** (operations per byte moved):
#
#     seconds >= max(operations / peak, bytes / bandwidth)
#
# ## The intensity of a linear layer
#
# `y = x W` with T tokens: `x [T, in]`, `W [in, out]`. Operations: 2 T in out. Bytes: the weights, once, and x and y.


# %%
def linear(tokens, inputs, outputs, weight_bytes=B):
    """Operations and bytes of one linear layer."""
    return 2 * tokens * inputs * outputs, weight_bytes * inputs * outputs + B * tokens * (inputs + outputs)


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


viz.table(
    ["layer", "in", "out", *(f"T = {t}" for t in (1, 8, 32, 512))],
    [[name, *size, *(round(intensity(linear(t, *size)), 1) for t in (1, 8, 32, 512))] for name, size in (LINEARS | {"lm_head": HEAD}).items()],
)

# %%
one = intensity(linear(1, *HEAD))
viz.predict(
    f"Numbers of {B} bytes, one token. How many operations are there for each byte of a weight?",
    [0.5, 1, 2, 576],
    round(2 / B, 1) if B != 2 else 1,
    "A weight is multiplied once and added once, then never needed again in this step. And it does not depend on the size "
    "of the matrix: a larger model is as memory-bound as a small one.",
)

# %%
h100 = DATA_SHEETS["H100 SXM"]
viz.predict(
    "With T tokens in the step each bf16 weight is used T times: intensity T. About how many tokens must a step of an H100 "
    "have before its multipliers are the limit?",
    [1, 30, 300, 3000],
    min([1, 30, 300, 3000], key=lambda t: abs(t - h100[0] / h100[1])),
    f"{h100[0] / 1e12:.0f} T / {h100[1] / 1e12:.2f} T = {h100[0] / h100[1]:.0f}. A batch of one uses a third of a percent of "
    "what was paid for. That is why servers batch (M2) and need memory for many requests at once (M3).",
)

# %% [markdown]
# ## A whole step
#
# A step computes T tokens. The linears see T rows; the head only the rows that sample. Attention is different: each
# sequence reads **its own** K and V, and nobody shares them, so a larger batch does not raise its intensity. For each KV
# number that is read, the query heads of its group do a multiply and an add.


# %%
def add(*works):
    return tuple(map(sum, zip(*works)))


def step(sequences, new, context):
    """Operations and bytes of a step: `new` tokens for each of `sequences`, with `context` tokens afterwards."""
    layers = add(*(linear(sequences * new, *size) for size in LINEARS.values()))
    seen = new * context - new * (new - 1) // 2  # (query, key) pairs of one sequence and head: a causal trapezium
    attention = 4 * sequences * seen * arch.q_size, 2 * B * sequences * context * arch.kv_size
    layer = add(layers, attention)
    return add((arch.num_hidden_layers * layer[0], arch.num_hidden_layers * layer[1]), linear(sequences, *HEAD))


def floor_seconds(work, machine):
    return max(work[0] / machine[0], work[1] / machine[1])


WORK = {f"decode, batch {n}": step(n, 1, CONTEXT) for n in BATCHES}
WORK |= {"decode, 32 x 4,096": step(32, 1, 4096)}
WORK |= {f"prompt of {n}": step(1, n, n) for n in PROMPTS}

figure, ax = plt.subplots(figsize=(9, 4.4))
for name, (top, slope), style in (("here", machines["here"], "-"), ("H100 SXM", h100, "--")):
    knee = top / slope
    ax.plot([0.3, knee, 3000], [0.3 * slope / 1e9, top / 1e9, top / 1e9], style, color=viz.INK, lw=1.4)
    ax.annotate(f"{name}: {slope / 1e9:,.0f} GB/s, then {top / 1e9:,.0f} Gflop/s", (knee, top / 1e9), (-40, 5), textcoords="offset points", size=8)
for i, (name, work) in enumerate(WORK.items()):
    y = work[0] / floor_seconds(work, machines["here"]) / 1e9
    ax.plot(intensity(work), y, "os^D"[i % 4], color=viz.PALETTE[i % len(viz.PALETTE)], label=f"{name}: {intensity(work):.1f} flop/byte")
ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Gflop/s at best", title="SmolLM2-135M under the roof of this machine")
ax.set_xlim(0.3, 3000)
ax.grid(alpha=0.25)
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8);

# %%
viz.table(
    ["step", "Gflop", "MB", "flop/byte", "ms at least, here", "tokens/s at most", "on an H100: ms"],
    [
        [name, round(work[0] / 1e9, 2), round(work[1] / 1e6), round(intensity(work), 1), round(1e3 * floor_seconds(work, machines["here"]), 2),
         round((int(name.split()[-1]) if name.startswith(("decode, b", "prompt")) else 32) / floor_seconds(work, machines["here"])),
         round(1e3 * floor_seconds(work, h100), 3)]
        for name, work in WORK.items()
    ],
)  # fmt: skip

# %% [markdown]
# Look at the two decodes of 32. With long contexts the bytes are no longer weights but K and V, and these no batch
# shares: the point moves *down* the slope again. How long must contexts be for that?

# %%
weights_mb = B * arch.num_parameters() / 1e6
crossing = int(round(B * arch.num_parameters() / arch.kv_bytes_per_token(B), -2))
viz.predict(
    f"The weights are {weights_mb:.0f} MB, a token's K and V {arch.kv_bytes_per_token(B):,} bytes. From how many tokens of context on, all "
    "sequences of the batch together, does a step read more KV cache than weights?",
    [500, 2_000, 11_700, 100_000],
    crossing,
    "For example 32 sequences of 365 tokens. Fewer KV heads (GQA) push it out, 4-bit weights pull it in.",
)

# %% [markdown]
# ## Is the model of two lines any good?
#
# Linears of the real size with random weights (speed does not look at values), as the engine runs them: packed for the
# processor, C++ where there is a compiler. First the prediction, from two numbers measured with quite other programs; then
# the clock. Watch the left: doubling the tokens costs nearly nothing, until the knee.

# %%
small = dataclasses.replace(arch, num_hidden_layers=LAYERS, vocab_size=1024)
model = random_model(small, DTYPE, CPU)
accelerate(model, None, KernelConfig(linear_backend="auto", fused_mlp="auto", huge_pages=True))
layers = model.model.layers


def run_linears(hidden):
    """Every matrix of every layer once; what lies between them is left out (but for SiLU, where gate_up does it itself)."""
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        hidden = attention.o_proj(attention.qkv_proj(hidden)[:, : arch.q_size])
        hidden = mlp.down_proj(mlp.gate_up_proj(hidden)[:, : arch.intermediate_size])
    return hidden


def linears_work(tokens):
    return tuple(LAYERS * x for x in add(*(linear(tokens, *size) for size in LINEARS.values())))


with torch.inference_mode():
    inputs = {t: torch.randn(t, arch.hidden_size).to(DTYPE) for t in TOKENS}
    measured = [best_seconds(lambda t=t: run_linears(inputs[t])) for t in TOKENS]
    bad = run_linears(inputs[TOKENS[-1]])
predicted = [floor_seconds(linears_work(t), machines["here"]) for t in TOKENS]
_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for ax, scale in ((left, 1), (right, None)):
    for values, style, label in ((predicted, "--", "max(operations / peak, bytes / bandwidth)"), (measured, "o-", "measured")):
        ax.plot(TOKENS, [1e3 * s / (scale or t) for t, s in zip(TOKENS, values)], style, label=label)
    ax.set(xscale="log", xlabel="tokens in the step")
    ax.set_xticks(TOKENS, TOKENS)
    ax.minorticks_off()
left.set(yscale="log", ylabel="ms", title=f"the linears of {LAYERS} layers")
right.set(yscale="log", ylabel="ms per token", title="the same, for each token")
left.legend();

# %% [markdown]
# Below the dashed line? Then what is read comes from a cache: with a small model, or a few layers, that is possible, and
# the line assumes main memory. Above it on the right: no kernel reaches the peak of one large square matrix.
#
# ## Tokens per second
#
# At last the whole engine, on a model of this shape with random weights: attention, norms, scheduler, sampler and all.
# The floor is what the two lines allow; the share that is reached is the honest way to say how good an engine is.

# %%
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from tests.tiny_models import build_tokenizer

transformers_logging.disable_progress_bar()
VOCAB, PROMPT, OUTPUT = (1024, 8, 4) if FAST else (arch.vocab_size, 32, 16)
shape = dataclasses.replace(arch, num_hidden_layers=LAYERS, vocab_size=VOCAB)
config = LlamaConfig(
    vocab_size=VOCAB, hidden_size=arch.hidden_size, intermediate_size=arch.intermediate_size, num_hidden_layers=LAYERS,
    num_attention_heads=arch.num_attention_heads, num_key_value_heads=arch.num_key_value_heads, tie_word_embeddings=True,
    max_position_embeddings=512, dtype=DTYPE,
)  # fmt: skip
scratch = tempfile.TemporaryDirectory()
LlamaForCausalLM(config).to(DTYPE).save_pretrained(scratch.name)
build_tokenizer().save_pretrained(scratch.name);

# %%
llm = LLM(scratch.name, preset="m4", max_model_len=128, num_kv_blocks=300, device="cpu")
greedy = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True, detokenize=False)


def tokens_per_second(batch):
    """Generated tokens per second of `batch` requests at once, their (short) prompts included."""
    prompts = [[(7 * i + j) % VOCAB for j in range(PROMPT)] for i in range(batch)]
    lengths = []

    def serve():
        lengths.extend(len(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy, use_tqdm=False))

    rate = batch * OUTPUT / best_seconds(serve, tries=2)
    assert set(lengths) == {OUTPUT}
    return rate


def floor_of(batch):
    """The same from the roofline: the prompts in one step, then one step per token."""
    def one_step(new, context):
        scale = LAYERS / arch.num_hidden_layers  # of the layers; the head is counted by itself
        body = step(batch, new, context)
        head, own = linear(batch, *HEAD), linear(batch, arch.hidden_size, VOCAB)
        return floor_seconds(tuple(scale * (x - h) + o for x, h, o in zip(body, head, own)), machines["here"])

    seconds = one_step(PROMPT, PROMPT) + sum(one_step(1, PROMPT + i) for i in range(1, OUTPUT))
    return batch * OUTPUT / seconds


served = (1, 4) if FAST else (1, 8, 32)
rates, bounds = [tokens_per_second(n) for n in served], [floor_of(n) for n in served]
viz.table(
    ["requests at once", "roofline: tokens/s", "measured: tokens/s", "share", "against one request"],
    [[n, round(bound), round(rate), f"{rate / bound:.0%}", round(rate / rates[0], 1)] for n, bound, rate in zip(served, bounds, rates)],
)

# %% [markdown]
# (A share above 100 %? Then something else used the machine while the two lines were measured. Run it again.)
#
# Batching is nearly free until the knee, and after it each request waits for the others. To go faster with *one*
# request there are only two ways: fewer bytes (4-bit weights: M7), or more tokens per pass over them (guessing several
# and checking them together: speculative decoding).

# %%
viz.table(
    ["bytes per weight", "MB of weights", "floor of one token here, ms", "tokens/s at most"],
    [[w, round(w * arch.num_parameters() / 1e6), round(1e3 * w * arch.num_parameters() / bandwidth, 2), round(bandwidth / (w * arch.num_parameters()))] for w in (4, 2, 1, 0.5)],
)

# %% [markdown]
# ## Is it all true?
#
# Counted things exactly; the clock only where no noise can spoil it.

# %%
counted = sum(p.numel() for p in random_model(small, DTYPE, CPU).parameters())
assert counted == dataclasses.replace(arch, num_hidden_layers=LAYERS, vocab_size=1024).num_parameters()
assert sum(i * o for i, o in LINEARS.values()) * 30 + HEAD[0] * HEAD[1] + 61 * 576 == arch.num_parameters() == 134_515_008
assert abs(intensity(linear(1, 10_000, 10_000)) - 2 / B) < 0.01 and abs(one - 2 / B) < 0.01
assert 290 < h100[0] / h100[1] < 300 and crossing == 11_700
decodes = [intensity(WORK[f"decode, batch {n}"]) for n in BATCHES]
assert decodes == sorted(decodes) and decodes[0] < 2, "a larger batch uses each weight more often"
assert intensity(WORK["decode, 32 x 4,096"]) < intensity(WORK["decode, batch 32"]), "long contexts share nothing"
assert intensity(WORK[f"prompt of {PROMPTS[-1]}"]) > 5 * intensity(WORK["decode, batch 32"])
assert bad.isfinite().all() and peak > 0 and bandwidth > 0
assert measured[TOKENS.index(16)] < 16 * measured[0], "16 tokens at once cost less than 16 times one"
assert rates[-1] > rates[0], "a batch is faster than one request"
print(f"all true: {bandwidth / 1e9:.0f} GB/s, {peak / 1e9:.0f} Gflop/s, knee at {peak / bandwidth:.0f} flop/byte")
