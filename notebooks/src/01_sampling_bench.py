# %% [markdown]
# # 01 · The sampling bench
#
# A model ends with one number per token of its vocabulary. Which token is it going to be? Always the best one gives
# dull, looping text; a fair draw gives, sooner or later, an absurd token, and everything after it goes astray. Between
# the two stand half a dozen knobs whose names everybody knows and whose order few can tell. Here we put a distribution
# of 12 words on the bench and watch what each knob of the **real sampler** does to it.
#
# *10 minutes. To read with it: `docs/learn/01_basic_inference.md` and `folovllm/sample/sampler.py`.*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import sys
from collections import Counter
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

import torch
from matplotlib import pyplot as plt

from folovllm import SamplingParams, viz
from folovllm.sample.metadata import SamplingMetadata, SamplingRow
from folovllm.sample.ops import topk_topp
from folovllm.sample.ops.noise import exponential_noise
from folovllm.sample.sampler import Sampler

torch.set_num_threads(1)
viz.style()

# %% [markdown]
# ## What you can turn
#
# What a model might think after "The cat sat on the". We write probabilities, because one can read them, and turn them
# into logits: a logarithm, and a constant that softmax does not see. (That constant will matter, just once.)

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
ax.set(title="after \"The cat sat on the\"", ylabel="probability");

# %% [markdown]
# ## Temperature: how much a difference counts
#
# How do you make a model bolder, or more careful, without telling it which words to prefer? Divide all logits by a
# number T. A *difference* of logits is a *ratio* of probabilities, so ratios are raised to the power 1/T.

# %%
cold = final(SamplingParams(temperature=0.5), output=[])
ratio = float(cold[ids["mat"]] / cold[ids["sofa"]])
viz.predict(
    "\"mat\" is twice as likely as \"sofa\". How many times as likely is it at temperature 0.5?",
    [1, 2, 4, 8],
    round(ratio),
    "2 to the power 1 / 0.5. At T -> 0 the best word takes everything, which is greedy sampling; at large T all are alike.",
)


# %%
def draw_temperature(ax, value):
    probs = final(SamplingParams(temperature=value), output=[])
    viz.bars(ax, words, probs.tolist())
    ax.set_ylim(0, 1)
    ax.set_xticks(range(V), words, rotation=90, size=7)


viz.explore(draw_temperature, "temperature", [0.3, 0.7, 1.0, 1.5, 3.0], size=(10, 2.4))

# %% [markdown]
# Temperature never removes a word: "idea" stays possible, and rises at T = 3. One absurd word in 200 sounds rare, but an
# answer has several hundred words.
#
# ## Three ways to cut the tail
#
# So cut it off. But where does the tail begin? Three rules, and all of them always keep the best word:
# **top_k** counts words, **top_p** adds up probability until it *reaches* p, **min_p** compares with the best word.

# %%
viz.predict(
    "top_k = 3. How many words stay? (Look at the bars of \"floor\" and \"bed\".)",
    [2, 3, 4],
    survivors(SamplingParams(top_k=3)),
    "The rule is \"not smaller than the third largest\", and the third and the fourth are equal. Throwing out one of two "
    "equals would need a second rule; with 50,000 logits in bf16, ties are common.",
)

# %%
warm, plain = SamplingParams(temperature=2.0, top_p=0.7), SamplingParams(top_p=0.7)
viz.predict(
    f"top_p = 0.7 keeps {survivors(plain)} words. How many does it keep if the temperature is 2 as well?",
    [survivors(plain) - 1, survivors(plain), survivors(warm)],
    survivors(warm),
    "Temperature comes first. It flattens the distribution, so more words are needed to reach 0.7: whoever asks for a bold "
    "text with top_p gets a longer tail, too.",
)

# %% [markdown]
# What if the model is sure, and what if it has no idea? A fixed k is too many in one case and too few in the other.
# Below, the same three settings on a sharp and on a flat version of our distribution (the outline is what came in).

# %%
rules = {"top_k 5": {"top_k": 5}, "top_p 0.9": {"top_p": 0.9}, "min_p 0.1": {"min_p": 0.1}}
kinds = {"sure": logits * 2.5, "unsure": logits * 0.35}
kept = {}
figure, axes = plt.subplots(2, 3, figsize=(10, 4.2), sharex=True, sharey="row", layout="none")
for axis_row, (kind, these) in zip(axes, kinds.items(), strict=True):
    for ax, (rule, args) in zip(axis_row, rules.items(), strict=True):
        probs = final(SamplingParams(**args), logits=these)
        kept[kind, rule] = int((probs > 0).sum())
        viz.bars(ax, words, probs.tolist(), viz.PALETTE[2], before=these.softmax(dim=-1).tolist())
        ax.set_title(f"{kind}, {rule}: {kept[kind, rule]} stay")

# %% [markdown]
# ## Penalties: not that again
#
# Small models love to repeat themselves. Three knobs look at what was said already. *Repetition* divides a positive
# logit and multiplies a negative one, and counts the prompt too; *frequency* subtracts once per occurrence in the
# output; *presence* subtracts once.

# %%
penalties = {
    "repetition 1.5": SamplingParams(repetition_penalty=1.5),
    "frequency 0.6": SamplingParams(frequency_penalty=0.6),
    "presence 0.6": SamplingParams(presence_penalty=0.6),
}
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), sharey=True, layout="none")
for ax, (name, params) in zip(axes, penalties.items(), strict=True):
    viz.bars(ax, words, final(params).tolist(), viz.PALETTE[5], before=logits.softmax(dim=-1).tolist())
    ax.set_title(f"{name} after {' '.join(OUTPUT)}")

# %% [markdown]
# Softmax does not see a constant that is added to all logits: a model may put out [3, 2] or [103, 102] for the same
# opinion. Which of the knobs can tell the two apart?

# %%
changed = [
    name.split()[0]
    for name, params in penalties.items()
    if not torch.allclose(final(params), final(params, logits=logits - 5), atol=1e-4)
]
viz.predict(
    "We subtract 5 from every logit. Under which penalty do the final probabilities change?",
    ["none", "repetition", "frequency and presence", "all three"],
    " and ".join(changed) if changed else "none",
    "It multiplies, so it depends on where zero happens to lie; the others subtract, and differences stay what they are. The "
    "same repetition_penalty can therefore be mild for one model and brutal for another.",
)

# %% [markdown]
# ## All of them, in order
#
# The order is part of the meaning: penalties, temperature, min_p, top_k, top_p, and each step sees what the one before
# left over. This is `PARAMS` from the top of the notebook; the outline is the step before.

# %%
path = stages(PARAMS)
figure, axes = plt.subplots(2, 3, figsize=(10, 4.6), sharex=True, sharey=True, layout="none")
for ax in axes.flat[len(path):]:
    ax.axis("off")
for i, (ax, (name, probs)) in enumerate(zip(axes.flat, path)):
    before = path[i - 1][1].tolist() if i else None
    viz.bars(ax, words, probs.tolist(), before=before)
    ax.set_title(f"{i}. {name}: {int((probs > 0).sum())} stay")

# %% [markdown]
# ## The draw: a race of alarm clocks
#
# Now draw. Each word gets an alarm clock that rings at a random time q / p, with q exponentially distributed: likely
# words ring early. The word that rings first is the token, and the probability to be first is exactly p. The sampler
# computes it as one `argmax(p / q)` for the whole batch; nothing has to be sorted or summed.

# %%
theory = path[-1][1]  # [V]
q = exponential_noise([SEED], [len(OUTPUT)], V, "cpu")[0]  # [V]
times = (q / theory).tolist()  # inf for words that were cut off
winner = words[int((theory / q).argmax())]
_, ax = plt.subplots(figsize=(9, 2.4))
alive = [i for i in range(V) if theory[i] > 0]
ax.bar(range(len(alive)), [times[i] for i in alive], color=[viz.PALETTE[5] if words[i] == winner else viz.PALETTE[4] for i in alive])
ax.set_xticks(range(len(alive)), [f"{words[i]}\np {theory[i]:.2f}" for i in alive])
ax.bar_label(ax.containers[0], [f"{times[i]:.2f}" for i in alive], size=8)
ax.set(ylabel="rings at", title=f"seed {SEED}, output token {len(OUTPUT)}: \"{winner}\" rings first");

# %% [markdown]
# One race proves nothing. Here are many, with another seed each, through the whole sampler in a single batch. The dots
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
# ## Seeds: whose random numbers?
#
# You send a request with a seed, twice, and want the same answer twice. But the second time the server is full of other
# people's requests, all drawing random numbers, too. With one random generator for everybody, yours would be used up by
# them. Ours has none: the noise is a *function* of (seed, index of the output token, token id).

# %%
def answer(seed, company=0, length=20):
    """The tokens of one request with PARAMS, in a batch with `company` strangers who draw as well."""
    output = []
    for _ in range(length):
        rows = [row(SamplingParams(temperature=3.0), seed=1000 + i) for i in range(company)]
        rows.insert(company // 2, row(PARAMS, seed=seed, output=output))
        picked = sampler(logits.expand(len(rows), V), SamplingMetadata.build(rows, V, "cpu")).sampled_token_ids
        output.append(words[picked[company // 2]])
    return output


alone, crowded, other = answer(SEED), answer(SEED, company=63), answer(SEED + 1)
differ = sum(a != b for a, b in zip(alone, crowded, strict=True))
viz.predict(
    f"A request with seed {SEED} draws 20 tokens alone, then 20 in a batch with 63 strangers. How many differ?",
    [0, "about half", 20],
    differ,
    "Nothing a neighbour does moves your noise. Nor does a draw that was thrown away: after a preemption the token is "
    "computed again with the same key.",
)

# %% [markdown]
# Every row below is one request; every column is the index of an output token. Same distribution everywhere, so what
# you see is only noise: no row resembles its neighbour shifted by one, which is what would happen if the key were
# simply seed + index.

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
# Our staircase of steps against the sampler's own final probabilities; the draws against the theory; the seeds. The
# statistical check uses five standard deviations and fixed seeds, so it passes always or never.

# %%
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
