# %% [markdown]
# # 00 · One token, all the way
#
# You type a text, and a word comes back. In between, the text is numbers in a dozen different shapes, and most confusion
# about inference engines is confusion about which shape you are looking at. In this notebook the three requests of the
# learning pages go through the **real engine**, and you look at the real tensors on all **12 stops** of the way.
#
# The model is tiny: two layers, trained in a second to know the answers to the three requests by heart, and nothing else.
# Its shapes and its path through the engine are those of any Llama.
#
# *30 minutes. Read [Start here](../docs/learn/00_start_here.md) first; [learn/01](../docs/learn/01_basic_inference.md) has the details.
# **Predict** asks before an experiment, and **Answer** follows it; `viz.ask("00.2", guess=5)` has your guess judged.
# Next: [01](01_sampling_bench.ipynb).*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import functools
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

warnings.filterwarnings("ignore", message="IProgress")  # tqdm asks for ipywidgets, which nothing here needs

import torch
from matplotlib import pyplot as plt

from folovllm import LLM, SamplingParams, viz
from folovllm.attention.backend import AttentionMetadata, sequence_slots
from folovllm.attention.backends.torch_naive import TorchNaiveBackend
from folovllm.engine.core import EngineCore
from folovllm.engine.detokenizer import TextStream
from folovllm.forward_context import get_attn_metadata
from folovllm.hub.tiny_model import write_tiny_model
from folovllm.learn.three_requests import EXAMPLES, LESSONS
from folovllm.worker.block_table import BlockTable
from folovllm.worker.model_runner import ModelRunner
from folovllm.worker.naive import NaiveModel, generate_naive

torch.set_num_threads(1)
viz.style()
COLOURS = viz.colours_of(EXAMPLES)

# %% [markdown]
# ## What you can change
#
# You can change the block size, and which tensor is printed below. With `USE_REAL_MODEL = True` the same requests run on SmolLM2-135M, if you
# have it (`folovllm pull smollm2-135m`). The answers stay the same, the vectors become longer, and there are 30 layers.

# %%
BLOCK_SIZE = 4  # tokens per block of the KV cache
LOOK_AT = 5  # the stop whose tensors are printed below, 3 to 9
USE_REAL_MODEL = False

# %%
if USE_REAL_MODEL:
    from folovllm.hub import find_model

    model_folder = find_model("smollm2-135m")  # says what to do if it is not here
else:
    scratch = tempfile.TemporaryDirectory()
    model_folder = write_tiny_model(Path(scratch.name), LESSONS)

llm = LLM(
    str(model_folder), preset="m3", block_size=BLOCK_SIZE, max_model_len=16, num_kv_blocks=max(10, 1 + 36 // BLOCK_SIZE), dtype="float32",
    attention_backend="torch_naive", device="cpu",
)  # fmt: skip
core = llm.llm_engine.engine_core  # decides: no tensors here
runner = core.executor.worker.model_runner  # computes: tensors only here
arch = llm.config.model_config.arch
tokenizer = llm.get_tokenizer()
viz.table(
    ["layers", "hidden size", "query heads", "KV heads", "head size", "vocabulary"],
    [[arch.num_hidden_layers, arch.hidden_size, arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim, arch.vocab_size]],
)

# %%
viz.table(
    ["request", "prompt", "prompt tokens", "tokens to generate", "arrives before step"],
    [[name, e.text, len(tokenizer.encode(e.text)), e.max_tokens, e.arrival] for name, e in EXAMPLES.items()],
)

# %% [markdown]
# ## A camera in the model
#
# How can you look into a forward pass without changing the engine? torch calls a *hook* after each module. Our hooks keep a
# copy of what the first layer and the two ends of the model put out. One step of the engine is four calls:

# %%
viz.source(EngineCore.step)

# %% [markdown]
# Most of these lines are for the case that something fails. The four calls are `schedule`, `execute`, `sample` and `update_from_output`. We
# make the same four, and keep what each of them leaves behind.

# %%
seen = {}
first_layer = runner.model.model.layers[0]


def keep(name):
    def hook(module, inputs, output):
        seen[name] = (output[0] if isinstance(output, tuple) else output).clone()

    return hook


def before_attention(module, inputs):
    heads = (arch.num_attention_heads, arch.num_key_value_heads, arch.num_key_value_heads)
    for name, tensor, num_heads in zip("qkv", inputs, heads, strict=True):
        seen[name] = tensor.reshape(-1, num_heads, arch.head_dim).clone()  # [num_tokens, num_heads, head_size]
    seen["metadata"] = get_attn_metadata()


watched = {
    "embedding": runner.model.model.embed_tokens, "qkv": first_layer.self_attn.qkv_proj,
    "attention": first_layer.self_attn.attn, "mlp": first_layer.mlp, "hidden": runner.model.model.norm,
    "logits": runner.model.lm_head,
}  # fmt: skip
for name, module in watched.items():
    module.register_forward_hook(keep(name))
first_layer.self_attn.attn.register_forward_pre_hook(before_attention)

requests = {
    name: llm.llm_engine.process(name, e.text, SamplingParams(temperature=0.0, max_tokens=e.max_tokens, ignore_eos=True))
    for name, e in EXAMPLES.items()
}


def step():
    """One step of the engine, and everything that we saw in it."""
    scheduled = core.scheduler.schedule()
    result = core.executor.sample(core.executor.execute(scheduled))
    tables = {name: core.scheduler.kv_cache_manager.get_block_ids(name)[0] for name in scheduled.num_scheduled_tokens}
    core.scheduler.update_from_output(scheduled, result)
    num_tokens = scheduled.total_num_scheduled_tokens
    return seen | {
        "counts": scheduled.num_scheduled_tokens, "tables": tables, "sampled": result.sampled_token_ids,
        "ids": runner.buffers.input_ids[:num_tokens].clone(), "positions": runner.buffers.positions[:num_tokens].clone(),
        "slots": runner.buffers.slot_mapping[:num_tokens].clone(), "kv_cache": runner.kv_caches[0].clone(),
        "known": {name: r.num_tokens for name, r in requests.items()},
        "computed": {name: r.num_computed_tokens for name, r in requests.items()},
    }  # fmt: skip


steps = []


def run_until(num_steps):
    """Runs the engine until so many steps are done; each request is added before the step in which it arrives."""
    while len(steps) < num_steps:
        for name, example in EXAMPLES.items():
            if example.arrival == len(steps):
                core.add_request(requests[name])
        steps.append(step())
    return steps

# %% [markdown]
# ## The 12 stops
#
# Step 0 computes the prompts of a and b, and the forward pass leaves a vector for each of their tokens. Two questions, and then it runs.

# %%
viz.ask("00.1")

# %%
viz.ask("00.2")

# %% [markdown]
# Shapes in brackets are those of the tensors that the step made. The core has no tensors at all: between core and worker pass
# two messages of plain data.

# %%
def shape(tensor):
    return str(list(tensor.shape))


def stops_of(moment, arriving):
    def each(values):
        return ", ".join(f"{name}: {value}" for name, value in values.items())

    pieces = {name: repr(tokenizer.decode(ids)) for name, ids in moment["sampled"].items()}
    texts = ", ".join(f"{name}: {len(EXAMPLES[name].text)}" for name in arriving)
    num_slots = runner.kv_caches[0][0].flatten(0, 1).shape[0]
    return [
        ("tokenise", f"characters {texts}" if arriving else "no new request"),
        ("schedule", f"tokens {each(moment['counts'])}"),
        ("flat batch", f"ids {shape(moment['ids'])}\nblock table {shape(moment['metadata'].block_table)}"),
        ("embed", shape(moment["embedding"])),
        ("q, k, v", f"q {shape(moment['q'])}\nk {shape(moment['k'])}"),
        ("write K, V", f"{len(moment['slots'])} of the {num_slots} slots\nin {shape(runner.kv_caches[0])}"),
        ("attend", shape(moment["attention"])),
        ("MLP", shape(moment["mlp"])),
        ("logits", shape(moment["logits"])),
        ("sample", "ids " + each({name: ids[0] for name, ids in moment["sampled"].items()})),
        ("update", f"known {each(moment['known'] if arriving != ['a', 'b'] else {n: moment['known'][n] for n in 'ab'})}"),
        ("text", each(pieces)),
    ]


steps = run_until(1)
_, ax = plt.subplots(figsize=(10, 4.6))
viz.route(ax, stops_of(steps[0], ["a", "b"]), arch.num_hidden_layers)
ax.set_title("step 0: the prompts of a and b");

# %%
viz.answer("00.1", len(steps[0]["logits"]))

# %%
viz.answer("00.2", steps[0]["computed"]["a"])

# %% [markdown]
# In step 2, request c arrives with its 12 tokens, while a and b are in the middle of their answers.

# %%
viz.ask("00.3")

# %%
steps = run_until(3)
_, ax = plt.subplots(figsize=(10, 4.6))
viz.route(ax, stops_of(steps[2], ["c"]), arch.num_hidden_layers)
ax.set_title("step 2: a and b decode, c is new");

# %%
viz.answer("00.3", len(steps[2]["qkv"]))

# %% [markdown]
# The stops are the same, and so is the code. People say *prefill* for what c does and *decode* for a and b; the engine does not distinguish them.
#
# This is what leaves the stop `LOOK_AT`. Change the variable above, and run this cell again.

# %%
leaves = {
    3: {name: steps[2][name] for name in ("ids", "positions", "slots")}, 4: steps[2]["embedding"],
    5: {name: steps[2][name] for name in "qkv"}, 6: steps[2]["kv_cache"], 7: steps[2]["attention"], 8: steps[2]["mlp"],
    9: steps[2]["logits"],
}  # fmt: skip
torch.set_printoptions(precision=2, threshold=20, edgeitems=2, linewidth=110, sci_mode=False)
print(f"stop {LOOK_AT}, {stops_of(steps[2], ['c'])[LOOK_AT - 1][0]}, step 2:\n")
print(leaves[LOOK_AT])

# %% [markdown]
# ## Stop 3: the flat batch
#
# The batch has no axis of requests: the new tokens of all requests stand in one row. Four lists say whose they are and where they belong.
#
# - `positions`: the place of each token in its request, counted from 0.
# - `slots`: where the K and V of each token go. Slots are numbered through all blocks, so block 5 has the slots 20 to 23.
# - `query_start_loc`: in which row each request begins, and the number of rows at the end.
# - `seq_lens`: how many tokens of each request are in the cache when the step is over.
#
# **Your turn.** Build the four lists. A request is given as (computed tokens, new tokens, block table).

# %%
def my_flat_batch(requests, block_size):
    """E.g. [(5, 2, [7, 2])] with blocks of 4: positions [5, 6], slots [9, 10], query_start_loc [0, 2], seq_lens [7]."""
    return None  # your code: {"positions": ..., "slots": ..., "query_start_loc": ..., "seq_lens": ...}

# %%
while core.has_unfinished_requests():
    steps = run_until(len(steps) + 1)


def work_of(moment):
    """What a step was asked to compute: (computed tokens, new tokens, block table) of each request."""
    starts = [length - n for length, n in zip(moment["metadata"].seq_lens, moment["counts"].values())]
    return list(zip(starts, moment["counts"].values(), moment["tables"].values()))


FLAT_BATCHES = [
    ((work_of(s), BLOCK_SIZE), {
        "positions": s["positions"].tolist(), "slots": s["slots"].tolist(),
        "query_start_loc": list(s["metadata"].query_start_loc), "seq_lens": list(s["metadata"].seq_lens),
    })
    for s in steps
]  # fmt: skip
viz.your_turn("00.t1", my_flat_batch, FLAT_BATCHES)

# %%
viz.ask("00.4", blocks=steps[2]["tables"]["c"])

# %%
second = steps[2]
owner = [name for name, n in second["counts"].items() for _ in range(n)]
_, ax = plt.subplots(figsize=(10, 1.9))
for i, (name, token, pos, slot) in enumerate(zip(owner, *(second[key].tolist() for key in ("ids", "positions", "slots")))):
    ax.add_patch(plt.Rectangle((i, 0), 0.94, 1, color=COLOURS[name]))
    text = f"{name}\npos {pos}\nslot {slot}"
    ax.text(i + 0.47, 0.5, text, ha="center", va="center", size=8, color=viz.INK if name == "b" else "white")
    ax.text(i + 0.47, 1.12, tokenizer.decode([token]).replace("\n", "\\n").strip(" "), ha="center", va="bottom", size=8)
ax.set(xlim=(0, len(owner)), ylim=(0, 1.3), xlabel="row of the flat batch")
ax.set_xticks([i + 0.47 for i in range(len(owner))], range(len(owner)))
ax.set_yticks([])
meta = second["metadata"]
ax.set_title(f"step 2: query_start_loc = {list(meta.query_start_loc)}, seq_lens = {list(meta.seq_lens)}");

# %%
index, offset = divmod(9, BLOCK_SIZE)
viz.answer(
    "00.4", int(second["slots"][2 + 9]),
    BLOCK_SIZE=BLOCK_SIZE, index=index, offset=offset, block=second["tables"]["c"][index],
)  # fmt: skip

# %% [markdown]
# The engine's version computes all rows at once:

# %%
viz.source(ModelRunner._prepare_inputs)

# %%
viz.source(BlockTable.slot_mapping)

# %% [markdown]
# ## Stop 6: the cache
#
# Attention writes K and V of the new tokens into their slots, in every layer. This is the K cache of the first layer.

# %%
viz.ask("00.5")

# %%
written = second["kv_cache"][0].flatten(0, 1).flatten(1).abs().sum(dim=1) > 0  # [num_slots]

# %%
keys = second["kv_cache"][0].flatten(0, 1).flatten(1)  # [num_slots, kv_heads * head_size]
_, ax = plt.subplots(figsize=(10, 3))
picture = torch.where(written.unsqueeze(1), keys, torch.nan).T
limit = float(keys.abs().max())
image = ax.imshow(picture, aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="none")
ax.figure.colorbar(image, ax=ax, label="value", pad=0.01)
for block in range(len(written) // BLOCK_SIZE):
    ax.axvline(block * BLOCK_SIZE - 0.5, color=viz.INK, lw=0.6)
blocks = {block: f"{name}{i}" for name, table in second["tables"].items() for i, block in enumerate(table)}
for block, label in blocks.items():
    place = block * BLOCK_SIZE - 0.5
    ax.add_patch(plt.Rectangle((place, -0.5), BLOCK_SIZE, -2.6, color=COLOURS[label[0]], clip_on=False))
    ax.text(place + BLOCK_SIZE / 2, -1.8, label, ha="center", va="center", size=8, color=viz.INK if label[0] == "b" else "white")
centres = [(b + 0.5) * BLOCK_SIZE - 0.5 for b in range(len(written) // BLOCK_SIZE)]
ax.set_xticks(centres, ["null" if b == 0 else f"block {b}" for b in range(len(centres))])
ax.set(ylabel="number in the key")
ax.set_title("K cache of layer 0 after step 2; white: no key; c1 is block 1 of request c", pad=18);

# %%
viz.answer("00.5", int(written.sum()))

# %% [markdown]
# Compare a0 with c0. Both hold "The capital of France" at the positions 0 to 3, and the keys are the same numbers. They were computed twice. (M6, prefix
# caching, computes them once; notebook 07.)

# %% [markdown]
# ## Stop 7: which token looks at which
#
# Attention is the only stop where tokens meet. A query is multiplied with the keys of its own request, up to its own position. The products,
# divided by the square root of the head size, go through a softmax, and the result says how much of each value is taken.

# %%
viz.ask("00.6")

# %% [markdown]
# **Your turn.** Compute the attention weights of one query: `q` has one number per dimension, `keys` has one row per token that it may look at.

# %%
def my_weights(q, keys):
    """q: [head_size]; keys: [num_keys, head_size]. Returns the weights, [num_keys]; they sum to 1."""
    return None  # your code

# %%
def keys_of(moment, name):
    """The keys of a request in layer 0, read from the cache through the block table: [seq_len, kv_heads, head_size]."""
    length = moment["metadata"].seq_lens[list(moment["counts"]).index(name)]
    slots = sequence_slots(torch.tensor(moment["tables"][name]), length, BLOCK_SIZE)
    return moment["kv_cache"][0].flatten(0, 1)[slots]


def weights_of(moment, name):
    """The attention weights of a request in layer 0, by the engine's own backend: [heads, num_queries, num_keys].

    The value of the token at position p is a 1 in place p, so the sum of weighted values is the list of weights.
    """
    row = list(moment["counts"]).index(name)
    start, end = moment["metadata"].query_start_loc[row : row + 2]
    length, table = moment["metadata"].seq_lens[row], moment["tables"][name]
    metadata = AttentionMetadata.single_sequence(length, table, BLOCK_SIZE, length - (end - start))
    cache = moment["kv_cache"].clone()
    cache[1].flatten(0, 1)[sequence_slots(torch.tensor(table), length, BLOCK_SIZE)] = (
        torch.eye(length, arch.head_dim).unsqueeze(1)  # [num_keys, 1, head_size]
    )
    runner.backend.prepare(metadata)
    return runner.backend.forward(moment["q"][start:end], cache, metadata)[:, :, :length].transpose(0, 1)


QUERIES = [(0, "a", 4), (2, "c", 3), (2, "b", 0)]  # step, request, number of the query among those of the step
ATTENTION = []
for number, name, query in QUERIES:
    weights = weights_of(steps[number], name)[0, query]
    row = list(steps[number]["counts"]).index(name)
    q = steps[number]["q"][steps[number]["metadata"].query_start_loc[row] + query, 0]
    num_keys = len(keys_of(steps[number], name)) - (steps[number]["counts"][name] - 1 - query)
    ATTENTION.append(((q, keys_of(steps[number], name)[:num_keys, 0]), weights[:num_keys].tolist()))


@functools.wraps(my_weights)
def rounded_weights(q, keys):
    mine = my_weights(q, keys)
    return None if mine is None else [round(float(w), 4) for w in mine]


viz.your_turn("00.t2", rounded_weights, [(args, [round(w, 4) for w in weights]) for args, weights in ATTENTION])

# %%
viz.source(TorchNaiveBackend._attend)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(12, 7), sharey=False)
for ax, name in zip(axes, "ca"):
    weights = weights_of(second, name)[0]
    future = torch.arange(weights.shape[1]) > torch.arange(weights.shape[1] - len(weights), weights.shape[1]).unsqueeze(1)
    image = ax.imshow(weights.masked_fill(future, torch.nan), cmap="viridis", vmin=0, vmax=1, interpolation="none", aspect="auto" if name == "a" else "equal")
    ids = requests[name].all_token_ids[: weights.shape[1]]
    texts = [tokenizer.decode([i]).replace("\n", "\\n").strip(" ") for i in ids]
    ax.set_xticks(range(len(texts)), texts, rotation=60, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(weights)), texts[-len(weights) :])
    ax.set(xlabel="key", ylabel="query", title=f"step 2, {name}: {shape(weights)}")
axes[1].set_box_aspect(1 / 7)
figure.colorbar(image, ax=axes, label="attention weight, head 0", shrink=0.7)
plt.show()

# %%
viz.answer("00.6", int((weights_of(second, "c")[0, 3] > 0).sum()))

# %% [markdown]
# c computes its whole prompt, so its picture is a triangle. a has one new token, which looks at everything that the cache has of a. That token is the
# full stop after " Paris". c has one in the same place after the same words, and the two rows of weights are the same.
#
# ## Stops 9 to 12: from a row of numbers to a text
#
# The hidden row of a request's last token times the output matrix gives one number for each token of the vocabulary. Greedy sampling takes the largest. These
# are the three largest of each request in step 2, as probabilities.

# %%
top = second["logits"].softmax(dim=-1).topk(3)
viz.table(
    ["request", "1st", "p", "2nd", "p", "3rd", "p"],
    [
        [name, *(x for p, i in zip(ps, ids) for x in (repr(tokenizer.decode([i])), p))]
        for name, ps, ids in zip(second["counts"], top.values.tolist(), top.indices.tolist())
    ],
)

# %% [markdown]
# A token is a piece of *bytes*, and a character may need several. The cup ☕ is three bytes, and this tokenizer has no token for it, so it becomes
# three tokens of one byte each. (SmolLM2 needs two tokens.)

# %%
cup = tokenizer.encode("Once ☕", add_special_tokens=False)

# %%
viz.ask("00.7", num_tokens=len(cup))

# %%
stream = TextStream(tokenizer, [], skip_special_tokens=True)
pieces = [stream.step(token_id) for token_id in cup]
first_shown = next(i for i, piece in enumerate(pieces) if "☕" in piece)

# %%
viz.table(
    ["token", "decoded alone", "new text to show"],
    [[i + 1, repr(tokenizer.decode([t])), repr(piece)] for i, (t, piece) in enumerate(zip(cup, pieces))],
)

# %%
viz.answer("00.7", first_shown + 1)

# %% [markdown]
# ## What the cache saves
#
# Without a KV cache every new token needs a forward pass over the whole text so far. The engine has such a path (`generate_naive`), as a judge
# of the other one: both must give the same tokens.
#
# **Your turn.** How many tokens go through the model in total, with a cache and without, for a prompt of `prompt` tokens and `output` new ones?

# %%
def my_counts(prompt, output):
    """Returns [tokens computed with a cache, tokens computed without one]."""
    return None  # your code

# %%
lengths = {name: (len(r.prompt_token_ids), len(r.output_token_ids)) for name, r in requests.items()}
naive, counted, no_cache_tokens = NaiveModel(model_folder), [0], {}
naive.model.register_forward_pre_hook(lambda module, inputs: counted.append(len(inputs[0])))
for name, example in EXAMPLES.items():
    oracle = llm.llm_engine.process(name, example.text, requests[name].sampling_params)
    counted.clear()
    generate_naive(naive, oracle)
    assert oracle.output_token_ids == requests[name].output_token_ids, "with a cache and without: the same tokens"
    no_cache_tokens[name] = sum(counted)
COUNTS = [
    (lengths[name], [sum(s["counts"].get(name, 0) for s in steps), no_cache_tokens[name]]) for name in EXAMPLES
]
viz.your_turn("00.t3", my_counts, COUNTS)

# %%
viz.table(
    ["request", "prompt + output", "answer", "computed with cache", "without"],
    [
        [name, "{} + {}".format(*lengths[name]), repr(tokenizer.decode(requests[name].output_token_ids)), *counts]
        for name, (_, counts) in zip(EXAMPLES, COUNTS)
    ],
)

# %% [markdown]
# ## Is it all true?
#
# The last cell checks what this notebook claims.

# %%
if viz.as_delivered("00", globals()):
    for name, example in EXAMPLES.items():
        assert tokenizer.decode(requests[name].output_token_ids) == "".join(example.answer_pieces[: example.max_tokens])
    assert len(steps) == 6 and second["counts"] == {"a": 1, "b": 1, "c": 12}
    assert steps[0]["logits"].shape == (2, arch.vocab_size) and second["qkv"].shape[0] == 14 and len(second["logits"]) == 3
    assert int(written.sum()) == 25 and second["computed"] == {"a": 7, "b": 6, "c": 12}
    for row, name in enumerate(second["counts"]):
        start, end = second["metadata"].query_start_loc[row : row + 2]
        slots = second["slots"].new_tensor(FLAT_BATCHES[2][1]["slots"])[start:end]
        torch.testing.assert_close(second["kv_cache"][0].flatten(0, 1)[slots], second["k"][start:end])
    v = second["v"][2:].repeat_interleave(arch.num_attention_heads // arch.num_key_value_heads, dim=1)  # c's values
    by_weights = torch.einsum("hqk,khd->qhd", weights_of(second, "c"), v).reshape(12, -1)
    torch.testing.assert_close(second["attention"][2:].reshape(12, -1), by_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(keys_of(second, "a")[:5], keys_of(second, "c")[:5], rtol=1e-4, atol=1e-5)  # the same words
    torch.testing.assert_close(weights_of(second, "a")[:, 0], weights_of(second, "c")[:, 6, :7], rtol=1e-4, atol=1e-5)
    assert "".join(pieces) == "Once ☕"
    print(f"all true: {len(steps)} steps, {sum(len(s['ids']) for s in steps)} tokens computed; without a cache {sum(no_cache_tokens.values())}")
