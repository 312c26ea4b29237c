# %% [markdown]
# # 01 · The sampling bench
#
# A model ends with one number per token of its vocabulary, and one token has to be chosen. Always taking the best one gives dull text
# that repeats itself. A fair draw gives an absurd token sooner or later, and everything after it goes astray. Between the two stand half a
# dozen parameters whose names are well known and whose order is not. Here you put a distribution of 12 words on the bench and watch what
# each parameter of the **real sampler** does to it.
#
# *30 minutes. Read "Choosing a token" in [learn/01](../docs/learn/01_basic_inference.md) first; the code is in `folovllm/sample/sampler.py`.
# **Predict** asks before an experiment, and **Answer** follows it; `viz.ask("01.1", guess=4)` has your guess judged.
# Next: [02](02_roofline.ipynb).*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import json
import sys
from collections import Counter
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

import torch
from matplotlib import pyplot as plt

from folovllm import SamplingParams, viz
from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.ops import penalties, topk_topp
from folovllm.sample.ops.noise import exponential_noise, random_key
from folovllm.sample.sampler import Sampler

torch.set_num_threads(1)
viz.style()

# %% [markdown]
# ## What a real model says
#
# These are the five likeliest next tokens of SmolLM2-135M for each token of the answers of the three requests, recorded in fp32 (`docs/data/first_tokens.json`).
# Greedy sampling, which all learning pages use, takes the first column.

# %%
recorded = json.loads((ROOT / "docs/data/first_tokens.json").read_text(encoding="utf-8"))["next_tokens"]
viz.table(
    ["token of the answer", *(f"{i}." for i in range(1, 6))],
    [[where, *(f"{text!r} {p:.3f}" for text, p in tokens)] for where, tokens in recorded.items()],
)

# %% [markdown]
# Some rows are sure (b0: a comma, 93 %), and some are not (b2: five tokens have 17 % together, and 49,147 others share the rest). One setting has to
# serve both.
#
# ## What you can change: the bench
#
# Here is what a model might think after "The cat sat on the". We write probabilities, because they are easy to read, and turn them into logits
# with a logarithm. A constant is added to all logits, which softmax does not see. (One parameter will.) You can change all of it.

# %%
WORDS = {
    "mat": 0.32, "sofa": 0.16, "floor": 0.12, "bed": 0.12, "table": 0.08, "roof": 0.06,
    "chair": 0.05, "dog": 0.04, "moon": 0.03, "piano": 0.01, "idea": 0.006, "the": 0.004,
}  # fmt: skip
SHIFT = 3.0  # added to every logit
PROMPT = ["the"]  # words of the prompt that are in the vocabulary
OUTPUT = ["mat", "mat", "sofa"]  # what was generated before
PARAMS = SamplingParams(
    temperature=1.2, min_p=0.05, top_k=8, top_p=0.9, frequency_penalty=0.4, presence_penalty=0.3, repetition_penalty=1.1
)
DRAWS = 2_000 if FAST else 10_000
SEED = 7

# %%
words = list(WORDS)
ids = {word: i for i, word in enumerate(words)}
V = len(words)
logits = torch.tensor(list(WORDS.values())).log() + SHIFT  # [V]
sampler = Sampler("processed_logprobs")


def row(params, seed=0, output=OUTPUT):
    """One row of logits to sample from: parameters, what was said, and the key of the noise."""
    said = [ids[w] for w in output]
    return SamplingRow(params, [ids[w] for w in PROMPT], said, eos_token_id=None, seed=seed, bad_words_token_ids=[])


def stages(params, logits=logits, output=OUTPUT):
    """The distribution after every step that `params` asks for, in the sampler's order: [(step, [V])]."""
    work = logits.clone().unsqueeze(0)  # [1, V]
    meta = SamplingMetadata.build([row(params, output=output)], V, "cpu")
    shown = [("as the model gave it", work.softmax(dim=-1)[0])]

    def after(name):
        shown.append((name, work.softmax(dim=-1)[0]))

    if meta.penalties is not None:
        sampler.apply_logits_processors(work, meta)
        after("penalties")
    if meta.temperature is not None:
        topk_topp.apply_temperature_(work, meta.temperature)
        after(f"temperature {params.temperature:g}")
    if meta.min_p is not None:
        topk_topp.apply_min_p_(work, meta.min_p)
        after(f"min_p {params.min_p:g}")
    if meta.top_k is not None:
        topk_topp.apply_top_k_(work, meta.top_k, meta.max_top_k)
        after(f"top_k {params.top_k}")
    if meta.top_p is not None:
        topk_topp.apply_top_p_(work, meta.top_p)
        after(f"top_p {params.top_p:g}")
    return shown


def final(params, **args):
    return stages(params, **args)[-1][1]  # [V]


def survivors(params, **args):
    return int((final(params, **args) > 0).sum())


_, ax = plt.subplots(figsize=(9, 2.4))
viz.bars(ax, words, logits.softmax(dim=-1).tolist())
ax.bar_label(ax.containers[0], [f"{p:g}" for p in WORDS.values()], size=8)
ax.set(title="after \"The cat sat on the\"", ylabel="probability");

# %% [markdown]
# ## Temperature: how much a difference counts
#
# How do you make a model bolder, or more careful, without telling it which words to prefer? You divide all logits by a
# number T. A *difference* of logits is a *ratio* of probabilities, so all ratios are raised to the power 1/T.

# %%
viz.ask("01.1")

# %%
cold = final(SamplingParams(temperature=0.5), output=[])
ratio = float(cold[ids["mat"]] / cold[ids["sofa"]])

# %%
def draw_temperature(ax, value):
    probs = final(SamplingParams(temperature=value), output=[])
    viz.bars(ax, words, probs.tolist())
    ax.set(ylim=(0, 1), ylabel="probability")
    ax.set_xticks(range(V), words, rotation=90, ha="center", rotation_mode="default", size=7)


viz.explore(draw_temperature, "temperature", [0.3, 0.7, 1.0, 1.5, 3.0], size=(10, 2.8))

# %%
viz.answer("01.1", round(ratio))

# %% [markdown]
# Temperature never removes a word. "idea" stays possible, and at T = 3 it is likelier than before. One absurd word in 200 sounds rare, but an
# answer has several hundred words.
#
# ## Three ways to cut the tail
#
# So the tail is cut off. But where does it begin? There are three rules, and each of them keeps the best word.
#
# - **top_k** keeps the k most likely words.
# - **top_p** adds up probabilities from the top, until the sum *reaches* p.
# - **min_p** keeps the words that are at least p times as likely as the best one.

# %%
viz.ask("01.2")

# %%
plain = survivors(SamplingParams(top_p=0.7))

# %%
viz.ask("01.3", options=[plain - 1, plain, plain + 2], plain=plain)

# %%
warm_probs, plain_probs = (final(SamplingParams(temperature=t, top_p=0.7), output=[]) for t in (2.0, 1.0))
three_probs = final(SamplingParams(top_k=3), output=[])
_, axes = plt.subplots(1, 3, figsize=(10, 2.6), sharex=True, sharey=True)
shown = {"top_k 3": three_probs, "top_p 0.7": plain_probs, "temperature 2, then top_p 0.7": warm_probs}
for ax, (title, probs) in zip(axes, shown.items()):
    viz.bars(ax, words, probs.tolist(), viz.PALETTE[2])
    ax.label_outer()
    ax.set_title(f"{title}: {int((probs > 0).sum())} stay")
axes[0].set_ylabel("probability");

# %%
viz.answer("01.2", int((three_probs > 0).sum()))

# %%
viz.answer("01.3", int((warm_probs > 0).sum()))

# %% [markdown]
# **Your turn.** Write top_p. Which words stay, if the probabilities are given from the most likely to the least likely?

# %%
def my_top_p(probs, p):
    """How many of `probs`, which are sorted and sum to 1, stay. E.g. my_top_p([0.5, 0.3, 0.15, 0.05], 0.7) is 2."""
    return None  # your code

# %%
def engine_top_p(probs, p):
    work = torch.tensor([probs]).log()  # [1, V]
    topk_topp.apply_top_p_(work, torch.tensor([p]))
    return int(work.isfinite().sum())


TOP_P = [([0.5, 0.3, 0.15, 0.05], p) for p in (0.01, 0.45, 0.7, 0.9, 0.99)] + [([0.25, 0.24, 0.2, 0.17, 0.14], 0.6)]
TOP_P = [((probs, p), engine_top_p(probs, p)) for probs, p in TOP_P]
viz.your_turn("01.t1", my_top_p, TOP_P)

# %% [markdown]
# The engine goes the other way: it adds up from the least likely word, and removes words while the sum is at most 1 - p.

# %%
viz.source(topk_topp.nucleus_by_sorting)

# %% [markdown]
# What happens if the model is sure, and what if it has no idea? We take a sharp and a flat version of our distribution.

# %%
sure, unsure = (float((logits * sharpness).softmax(dim=-1).max()) for sharpness in (2.5, 0.35))

# %%
viz.ask("01.4", sure=sure, unsure=unsure)

# %%
rules = {"top_k 5": {"top_k": 5}, "top_p 0.9": {"top_p": 0.9}, "min_p 0.1": {"min_p": 0.1}}
kinds = {"sure": logits * 2.5, "unsure": logits * 0.35}
kept = {}
figure, axes = plt.subplots(2, 3, figsize=(10, 4.4), sharex=True, sharey=True)
for axis_row, (kind, these) in zip(axes, kinds.items(), strict=True):
    for ax, (rule, args) in zip(axis_row, rules.items(), strict=True):
        probs = final(SamplingParams(**args), logits=these)
        kept[kind, rule] = int((probs > 0).sum())
        viz.bars(ax, words, probs.tolist(), viz.PALETTE[2], before=these.softmax(dim=-1).tolist())
        ax.label_outer()
        ax.set_title(f"{kind}, {rule}: {kept[kind, rule]} stay")
figure.supylabel("probability (outline: what came in)", size=9)
plt.show()

# %%
viz.answer("01.4", max(rules, key=lambda rule: abs(kept["sure", rule] - kept["unsure", rule])))

# %% [markdown]
# ## Penalties against repetition
#
# Small models repeat themselves easily. Three parameters look at which words were there already. Here the output so far is "mat mat sofa", and the prompt
# contains "the".
#
# - **repetition r** divides a positive logit by r and multiplies a negative one with r. It counts the prompt, too.
# - **frequency f** subtracts f for each occurrence in the output.
# - **presence p** subtracts p once, if the word occurs in the output.
#
# **Your turn.** Write it for one word, in plain Python. The engine's sampler is asked for the same logit.

# %%
def my_penalised(logit, in_prompt, count, repetition, frequency, presence):
    """The logit afterwards. `count` is how often the word occurs in the output, `in_prompt` whether the prompt has it."""
    return None  # your code

# %%
def engine_penalised(logit, in_prompt, count, repetition, frequency, presence):
    params = SamplingParams(repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence)
    one = SamplingRow(params, [0] if in_prompt else [1], [0] * count, eos_token_id=None, seed=0, bad_words_token_ids=[])
    work = torch.tensor([[logit, 0.0]])  # word 0 is the one, word 1 another
    sampler.apply_logits_processors(work, SamplingMetadata.build([one], 2, "cpu"))
    return float(work[0, 0])


PENALISED = [
    (2.0, False, 0, 1.5, 0.5, 0.25), (2.0, True, 0, 1.5, 0.5, 0.25), (3.0, False, 2, 1.5, 0.5, 0.25),
    (-3.0, True, 1, 2.0, 0.0, 0.0), (1.0, False, 3, 1.0, 0.5, 0.25), (-1.0, False, 1, 2.0, 0.5, 1.0),
]  # fmt: skip
PENALISED = [(case, engine_penalised(*case)) for case in PENALISED]
viz.your_turn("01.t2", my_penalised, PENALISED)

# %%
viz.source(penalties.apply_penalties_)

# %% [markdown]
# Softmax does not see a constant that is added to all logits: a model may put out [3, 2] or [103, 102] for the same opinion. Which of the penalties can
# tell the two apart?

# %%
viz.ask("01.5")

# %%
strengths = {
    "repetition 1.5": SamplingParams(repetition_penalty=1.5),
    "frequency 0.6": SamplingParams(frequency_penalty=0.6),
    "presence 0.6": SamplingParams(presence_penalty=0.6),
}
changed = [
    name.split()[0]
    for name, params in strengths.items()
    if not torch.allclose(final(params), final(params, logits=logits - 5), atol=1e-4)
]

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), sharex=True, sharey=True)
for ax, (name, params) in zip(axes, strengths.items(), strict=True):
    viz.bars(ax, words, final(params).tolist(), viz.PALETTE[5], before=logits.softmax(dim=-1).tolist())
    ax.set(title=f"{name} after \"{' '.join(OUTPUT)}\"", ylabel="probability")
    ax.label_outer()

# %%
viz.answer("01.5", changed)

# %% [markdown]
# ## All of them, in order
#
# The order is part of the meaning: penalties, temperature, min_p, top_k, top_p. Each step sees what the one before it has left. This is `PARAMS` from
# above, with `top_k=8` and `top_p=0.9`.

# %%
viz.source(Sampler._sample_rows)

# %%
alone_top_p = survivors(SamplingParams(top_p=PARAMS.top_p), output=[])

# %%
viz.ask("01.6", top_p=PARAMS.top_p, top_k=PARAMS.top_k, alone=alone_top_p)

# %%
path = stages(PARAMS)

# %%
figure, axes = plt.subplots(2, 3, figsize=(10, 4.6), sharex=True, sharey=True)
for ax in axes.flat[len(path):]:
    ax.axis("off")
for i, (ax, (name, probs)) in enumerate(zip(axes.flat, path)):
    before = path[i - 1][1].tolist() if i else None
    viz.bars(ax, words, probs.tolist(), before=before)
    ax.label_outer()
    ax.set_title(f"{i}. {name}: {int((probs > 0).sum())} stay")
figure.supylabel("probability (outline: the step before)", size=9)
plt.show()

# %%
viz.answer("01.6", int((path[-1][1] > 0).sum()))

# %% [markdown]
# ## The draw: a race of alarm clocks
#
# Now one word is drawn. Each word gets an alarm clock that rings at a random time q / p, where q is exponentially distributed, so likely words tend to ring
# early. The word that rings first is the token. The probability of being first is exactly p. Nothing has to be sorted or summed.

# %%
theory = path[-1][1]  # [V]
p_floor, p_chair = (float(theory[ids[word]]) for word in ("floor", "chair"))

# %%
viz.ask("01.7", p_floor=p_floor, p_chair=p_chair)

# %%
chance = p_floor / max(p_floor + p_chair, 1e-9)
many = exponential_noise(range(DRAWS), [0] * DRAWS, V, "cpu")  # [DRAWS, V]
share = float((many[:, ids["floor"]] / p_floor < many[:, ids["chair"]] / p_chair).float().mean())

# %%
viz.answer("01.7", share, DRAWS=DRAWS, chance=chance)

# %% [markdown]
# **Your turn.** Write the draw. `probs` are the probabilities, some of which are 0, and `noise` the numbers q. Return the index of the word whose clock rings
# first.

# %%
def my_draw(probs, noise):
    """E.g. my_draw([0.5, 0.0, 0.5], [0.9, 0.1, 0.3]) is 2: the clocks ring at 1.8, never, and 0.6."""
    return None  # your code

# %%
RACES = [((theory.tolist(), many[i].tolist()), int(topk_topp.race(theory, many[i : i + 1].clone())[0])) for i in range(50)]
viz.your_turn("01.t3", my_draw, RACES)

# %%
viz.source(topk_topp.race)

# %%
q = exponential_noise([SEED], [len(OUTPUT)], V, "cpu")[0]  # [V]
times = (q / theory).tolist()  # inf for words that were cut off
winner = words[int((theory / q).argmax())]
_, ax = plt.subplots(figsize=(9, 2.4))
alive = [i for i in range(V) if theory[i] > 0]
ax.bar(range(len(alive)), [times[i] for i in alive], color=[viz.PALETTE[5] if words[i] == winner else viz.PALETTE[4] for i in alive])
ax.set_xticks(range(len(alive)), [f"{words[i]}\np {theory[i]:.2f}" for i in alive])
ax.bar_label(ax.containers[0], [f"{times[i]:.2f}" for i in alive], size=8)
ax.margins(y=0.15)
ax.set(ylabel="rings at q / p", title=f"seed {SEED}, output token {len(OUTPUT)}: \"{winner}\" rings first");

# %% [markdown]
# One race proves nothing. Here are many, each with another seed, through the whole sampler in a single batch. The dots
# are what the theory (the last picture of the six) demands, with bars of three standard deviations.

# %%
batch = [row(PARAMS, seed=seed) for seed in range(DRAWS)]
drawn = sampler(logits.expand(DRAWS, V), SamplingMetadata.build(batch, V, "cpu")).sampled_token_ids
counts = Counter(drawn)
expected = (theory * DRAWS).tolist()
sigma = (theory * (1 - theory) * DRAWS).sqrt().tolist()
_, ax = plt.subplots(figsize=(9, 2.8))
ax.bar(range(V), [counts[i] for i in range(V)], color=viz.PALETTE[4], label=f"{DRAWS:,} draws")
ax.errorbar(alive, [expected[i] for i in alive], [3 * sigma[i] for i in alive], fmt="o", color=viz.INK, markersize=4, capsize=3, label="theory, 3 sigma")
ax.set_xticks(range(V), words)
ax.legend()
ax.set_title("how often each word was drawn");

# %% [markdown]
# ## Seeds
#
# You send a request with a seed, twice, and want the same answer twice. But the second time the server is full of other requests, which draw random
# numbers, too. If all requests shared one random generator, they would use up its numbers, and yours would change. Our sampler has no generator: the noise is a *function* of
# three numbers, which are seed, index of the output token, and token id.

# %%
viz.source(random_key)

# %%
viz.ask("01.8", SEED=SEED)

# %%
def answer(seed, company=0, length=20):
    """The tokens of one request with PARAMS, in a batch with `company` other requests that draw as well."""
    output = []
    for _ in range(length):
        rows = [row(SamplingParams(temperature=3.0), seed=1000 + i) for i in range(company)]
        rows.insert(company // 2, row(PARAMS, seed=seed, output=output))
        picked = sampler(logits.expand(len(rows), V), SamplingMetadata.build(rows, V, "cpu")).sampled_token_ids
        output.append(words[picked[company // 2]])
    return output


alone, crowded, other = answer(SEED), answer(SEED, company=63), answer(SEED + 1)
differ = sum(a != b for a, b in zip(alone, crowded, strict=True))

# %%
viz.answer("01.8", differ)

# %% [markdown]
# In the picture each row is a request, and each column is the index of an output token. The distribution is the same everywhere, so all you see is noise. If the
# key were simply seed + index, each row would be the row above it, shifted by one.

# %%
seeds, length = 8, 40
colour_of = {i: c for c, i in enumerate(alive)}
grid = torch.stack([
    topk_topp.random_sample(theory.expand(length, V), [s] * length, list(range(length))) for s in range(SEED, SEED + seeds)
])  # [seeds, length]
palette = plt.matplotlib.colors.ListedColormap([viz.PALETTE[c % len(viz.PALETTE)] for c in range(len(alive))])
coloured = [[colour_of[i] for i in line] for line in grid.tolist()]
_, ax = plt.subplots(figsize=(10, 2.4))
image = ax.imshow(coloured, aspect="auto", cmap=palette, vmin=-0.5, vmax=len(alive) - 0.5, interpolation="none")
bar = ax.figure.colorbar(image, ax=ax, ticks=range(len(alive)))
bar.ax.set_yticklabels([words[i] for i in alive], size=8)
ax.set_yticks(range(seeds), [f"seed {s}" for s in range(SEED, SEED + seeds)])
ax.set(xlabel="index of the output token", title="which word each (seed, index) draws");

# %% [markdown]
# ## Is it all true?
#
# The last cell checks what this notebook claims. The statistical check uses five standard deviations and fixed seeds, so it passes always or never.

# %%
if viz.as_delivered("01", globals()):
    assert abs(share - chance) < 0.03
    asked = row(SamplingParams(**{**PARAMS.__dict__, "logprobs": V}))
    own = sampler(logits.unsqueeze(0), SamplingMetadata.build([asked], V, "cpu")).logprobs[0]
    by_sampler = torch.zeros(V)
    by_sampler[own.token_ids] = torch.tensor(own.logprobs).exp()
    torch.testing.assert_close(theory, by_sampler)
    for _, probs in path:
        torch.testing.assert_close(probs.sum(), torch.tensor(1.0))
    assert [int((p > 0).sum()) for _, p in path] == sorted((int((p > 0).sum()) for _, p in path), reverse=True)
    assert all(counts[i] == 0 for i in range(V) if theory[i] == 0), "a word that was cut off was drawn"
    assert all(abs(counts[i] - expected[i]) <= 5 * sigma[i] + 1e-9 for i in range(V)), "the draw is not fair"
    assert min(kept.values()) >= 1, "the best word always stays"
    assert all(kept["sure", rule] < kept["unsure", rule] for rule in ("top_p 0.9", "min_p 0.1")), "these two adapt"
    assert torch.allclose(cold, logits.softmax(dim=-1) ** 2 / (logits.softmax(dim=-1) ** 2).sum(), atol=1e-6)
    assert alone == crowded and alone == answer(SEED) and alone != other
    assert winner == words[sampler(logits.unsqueeze(0), SamplingMetadata.build([row(PARAMS, SEED)], V, "cpu")).sampled_token_ids[0]]
    print(f"all true: {DRAWS:,} draws, {len(counts)} of {V} words; seed {SEED} says {' '.join(alone[:6])} ...")
