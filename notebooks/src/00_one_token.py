# %% [markdown]
# # 00 · One token, all the way
#
# You type a text, and a word comes back. In between, the text is numbers in a dozen different shapes, and most confusion
# about inference engines is confusion about which shape we are in. This notebook follows one request through all
# **12 stops** of the real engine and looks at the real tensors. Nothing is drawn that the engine did not compute.
#
# The model is tiny and its weights are random, so it writes nonsense; the shapes and the path are those of any Llama.
# *10 minutes. To read with it: `docs/learn/01_basic_inference.md`.*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))  # for tests/tiny_models.py

warnings.filterwarnings("ignore", message="IProgress")  # tqdm would like ipywidgets; nothing here needs them

import torch
from matplotlib import pyplot as plt

from folovllm import LLM, SamplingParams, viz
from folovllm.forward_context import get_attn_metadata

torch.set_num_threads(1)
viz.style()

# %% [markdown]
# ## What you can turn
#
# Another prompt, another block size, another stop to look at. With `USE_REAL_MODEL = True` the same path runs on
# SmolLM2-135M, if you have it (`folovllm pull smollm2-135m`): other numbers in the same shapes.

# %%
PROMPT = "The cat sat on the"
SECOND_PROMPT = "Meanwhile"  # joins while the first one is being answered
BLOCK_SIZE = 4  # tokens per page of the KV cache
LOOK_AT = 6  # the stop whose tensor is printed below, 1 to 12
USE_REAL_MODEL = False

# %%
if USE_REAL_MODEL:
    from folovllm.hub import find_model

    model_folder = find_model("smollm2-135m")  # says what to do if it is not here
else:
    from transformers.utils import logging

    from tests.tiny_models import make_tiny

    logging.disable_progress_bar()
    scratch = tempfile.TemporaryDirectory()
    model_folder = make_tiny("llama_rope", Path(scratch.name))

llm = LLM(
    str(model_folder), preset="m3", block_size=BLOCK_SIZE, max_model_len=64, num_kv_blocks=33, dtype="float32",
    attention_backend="torch_naive", device="cpu",
)  # fmt: skip
core = llm.llm_engine.engine_core  # decides: no tensors here
runner = core.executor.worker.model_runner  # computes: tensors only here
arch = llm.config.model_config.arch
tokenizer = llm.get_tokenizer()
print(
    f"{arch.num_hidden_layers} layers, hidden size {arch.hidden_size}, {arch.num_attention_heads} query heads, "
    f"{arch.num_key_value_heads} KV heads of size {arch.head_dim}, vocabulary {arch.vocab_size:,}"
)

# %% [markdown]
# ## A camera in the model
#
# How do you see inside a forward pass without changing the engine? torch calls a *hook* after each module; ours keep a
# copy of what the first layer and the two ends of the model put out. Then we take one step of the engine in its four
# calls, exactly those of `EngineCore.step`: schedule, execute, sample, update.

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


def step():
    """One step of the engine, and everything we saw in it."""
    scheduled = core.scheduler.schedule()
    handle = core.executor.execute(scheduled)
    result = core.executor.sample(handle)
    core.scheduler.update_from_output(scheduled, result)
    num_tokens = scheduled.total_num_scheduled_tokens
    return seen | {
        "scheduled": scheduled, "sampled": result.sampled_token_ids, "positions": runner.positions[:num_tokens].clone(),
        "slots": runner.slot_mapping[:num_tokens].clone(), "ids": runner.input_ids[:num_tokens].clone(),
    }  # fmt: skip


params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
request = llm.llm_engine.process("A", PROMPT, params)
before = {"known": request.num_tokens, "computed": request.num_computed_tokens, "status": request.status.name}
core.add_request(request)
first = step()
after_first = {"known": request.num_tokens, "computed": request.num_computed_tokens, "status": request.status.name}

# %% [markdown]
# The step has run, but do not scroll on yet. A forward pass computes a hidden vector for **every** token of the prompt.

# %%
N = request.num_prompt_tokens
viz.predict(
    f"The prompt has {N} tokens. How many rows of logits, each as long as the vocabulary, did this step compute?",
    [f"{N}, one per token", f"{N - 1}, one per token that has a successor", "1"],
    "1" if first["logits"].shape[0] == 1 else f"{first['logits'].shape[0]}, one per token",
    "Only the last token's successor is unknown. The last matrix is the model's largest (hidden size x vocabulary), "
    "so the runner picks the rows to be sampled before it multiplies.",
)

# %%
viz.predict(
    f"After this step the request knows {N + 1} tokens: the prompt and one that was sampled. Of how many does the cache "
    "hold K and V?",
    [N - 1, N, N + 1],
    after_first["computed"],
    "The sampled token has not been through the model yet. Closing that gap is all that the next step does.",
)

# %% [markdown]
# ## The 12 stops
#
# Shapes in brackets are those of the tensors that this step made. Stops 1 to 3 and 12 are in the core, which has no
# tensors at all; 4 to 11 are in the worker. Between them travels plain data: who computes how many tokens, and in which
# blocks.


# %%
def shape(tensor):
    return str(list(tensor.shape))


def route(moment, text):
    scheduled, meta = moment["scheduled"], moment["metadata"]
    counts = ", ".join(f"{r}: {n}" for r, n in scheduled.num_scheduled_tokens.items())
    return [
        ("tokenise", text),
        ("request", "computed catches up\nwith known"),
        ("schedule", f"tokens {{{counts}}}"),
        ("flat batch", f"ids {shape(moment['ids'])}\nblock_table {shape(meta.block_table)}"),
        ("embed", shape(moment["embedding"])),
        ("q, k, v", f"{shape(moment['qkv'])}\nq {shape(moment['q'])}  k {shape(moment['k'])}"),
        ("write K, V", f"slots {shape(moment['slots'])} of\n{shape(runner.kv_caches[0])}"),
        ("attend", shape(moment["attention"])),
        ("MLP, next layers", shape(moment["hidden"])),
        ("logits", shape(moment["logits"])),
        ("sample", f"{list(moment['sampled'].values())}"),
        ("text", "a character,\nor not yet"),
    ]


_, ax = plt.subplots(figsize=(10, 4.2))
viz.stops(ax, route(first, f"{len(PROMPT)} characters\n-> {N} ids"), upto=12)
ax.set_title(f"Step 1: the whole prompt, {N} tokens")

# %% [markdown]
# The same 12 stops in the next step. **Nothing else is different**: no second code path, only a 1 where there was a
# larger number. People say "prefill" and "decode" for the two; the engine does not know these words.

# %%
second = step()
_, ax = plt.subplots(figsize=(10, 4.2))
viz.stops(ax, route(second, "already done"), upto=12)
ax.set_title("Step 2: the token that step 1 sampled")

# %% [markdown]
# And here is what leaves stop `LOOK_AT`, as it is. Change the variable above and run this cell again.

# %%
leaves = [
    request.prompt_token_ids, before, first["scheduled"].num_scheduled_tokens,
    {"ids": first["ids"], "positions": first["positions"], "slots": first["slots"]}, first["embedding"],
    {"q": first["q"], "k": first["k"], "v": first["v"]}, runner.kv_caches[0], first["attention"], first["hidden"],
    first["logits"], first["sampled"], tokenizer.decode(request.output_token_ids),
]  # fmt: skip
torch.set_printoptions(precision=2, threshold=20, edgeitems=2, linewidth=110, sci_mode=False)
print(f"stop {LOOK_AT}, {route(first, '')[LOOK_AT - 1][0]}, step 1:\n")
print(leaves[LOOK_AT - 1])

# %% [markdown]
# ## Stops 4 and 7: where does a token's K and V go?
#
# A request's tokens are numbered 0, 1, 2, ...: its *positions*. The cache is one array of slots shared by everybody. The
# block table leads from one to the other: `slot = block_table[position // block_size] * block_size + position %
# block_size`.

# %%
position = min(N - 1, 2 * BLOCK_SIZE + 1)
table = core.scheduler.kv_cache_manager.get_block_ids("A")[0]
viz.predict(
    f"Request A owns the blocks {table}, each of {BLOCK_SIZE} tokens. In which slot of the cache lie the K and V of "
    f"its position {position}?",
    None,
    int(first["slots"][position]),
    f"Block number {position // BLOCK_SIZE} of the request is block {table[position // BLOCK_SIZE]} of the pool; "
    f"inside it comes offset {position % BLOCK_SIZE}. Block 0 is the null block and belongs to nobody.",
)

# %% [markdown]
# The next picture is the K cache of the first layer itself: one column per slot, one row per number of a key. White
# columns are slots that nobody has written.

# %%
keys = runner.kv_caches[0][0].reshape(-1, arch.num_key_value_heads * arch.head_dim)  # [num_slots, kv_heads * head_size]
shown = keys[: (len(table) + 2) * BLOCK_SIZE]
written = shown.abs().sum(dim=1) > 0
_, ax = plt.subplots(figsize=(10, 2.6))
picture = torch.where(written.unsqueeze(1), shown, torch.nan).T
limit = float(shown.abs().max())
ax.imshow(picture, aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="none")
for block in range(len(table) + 3):
    ax.axvline(block * BLOCK_SIZE - 0.5, color=viz.INK, lw=0.6)
ax.set_xticks([b * BLOCK_SIZE + (BLOCK_SIZE - 1) / 2 for b in range(len(table) + 2)], [f"block {b}" for b in range(len(table) + 2)])
ax.set(ylabel="number in the key", title=f"K cache of layer 0 after step 2: {int(written.sum())} slots written")

# %% [markdown]
# ## Stop 8: who looks at whom
#
# Attention is the only stop where tokens meet. We recompute it by hand, reading K and V out of the cache through the
# block table, and compare with what the engine's backend gave. In step 1 the mask is a triangle; in step 2 one query
# looks at everything before it, so no mask is needed.


# %%
def attention_by_hand(moment):
    """(output [num_queries, heads * head_size], weights [heads, num_queries, num_keys]) of request A, layer 0."""
    q, length = moment["q"], moment["metadata"].seq_lens[0]
    block_table = moment["metadata"].block_table[0]
    where = torch.arange(length)
    slots = block_table[where // BLOCK_SIZE].long() * BLOCK_SIZE + where % BLOCK_SIZE
    k, v = runner.kv_caches[0].reshape(2, -1, arch.num_key_value_heads, arch.head_dim)[:, slots]
    group = arch.num_attention_heads // arch.num_key_value_heads  # query heads that share a KV head
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [num_keys, heads, head_size]
    scores = torch.einsum("qhd,khd->hqk", q, k) / arch.head_dim**0.5
    query_positions = torch.arange(length - len(q), length).unsqueeze(1)
    weights = scores.masked_fill(torch.arange(length) > query_positions, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1), weights


by_hand = [attention_by_hand(moment) for moment in (first, second)]
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(1, 1))
for ax, (_, weights), title in zip(axes, by_hand, ("Step 1: a triangle", "Step 2: one query"), strict=True):
    image = ax.imshow(weights[0], cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="none")
    ax.set(xlabel="key position", ylabel="query", title=f"{title}, {shape(weights[0])}")
    ax.set_yticks(range(0, weights.shape[1], max(1, weights.shape[1] // 5)))
figure.colorbar(image, ax=axes, label="attention weight, head 0")

# %% [markdown]
# ## Stops 10 to 12: from a row of numbers to a character
#
# The last hidden row times the output matrix gives one number per token of the vocabulary; greedy sampling takes the
# largest. But a token is a piece of *bytes*, and a character may need several. The detokeniser waits until it is sure.

# %%
from folovllm.engine.detokenizer import TextStream

while not request.is_finished:
    step()
stream = TextStream(tokenizer, request.prompt_token_ids, skip_special_tokens=True)
pieces = [stream.step(token_id) for token_id in request.output_token_ids]
rest = stream.flush()
viz.table(
    ["output token", "id", "decoded alone", "new text to show"],
    [(i, t, repr(tokenizer.decode([t])), repr(p)) for i, (t, p) in enumerate(zip(request.output_token_ids, pieces))]
    + [("end", "", "", repr(rest))],
)

# %% [markdown]
# Empty rows are tokens in the middle of a character that may still be completed; at the end the remaining bytes are
# written as �, the sign for "no character". (This model writes random bytes; a trained one rarely shows it.)
#
# ## Two requests in one step
#
# The flat batch has no batch axis: tokens of all requests stand in one row. So what happens to the shapes when a second
# request arrives while the first is being answered?

# %%
requests = {"A2": PROMPT, "B": SECOND_PROMPT}
core.add_request(llm.llm_engine.process("A2", PROMPT, params))
step()
core.add_request(llm.llm_engine.process("B", SECOND_PROMPT, params))
mixed = step()
counts = mixed["scheduled"].num_scheduled_tokens
viz.predict(
    f"A2 has computed its prompt and wants 1 token; B arrives with {counts['B']}. How many times is the q, k, v matrix "
    "multiplied in this step, and with how many rows?",
    [f"twice: 1 row and {counts['B']} rows", f"once: {1 + counts['B']} rows", f"once: 2 x {counts['B']} rows, padded"],
    f"once: {len(mixed['qkv'])} rows",
    "Linear layers treat each row alone, so nobody has to know whose rows they are. Only attention does.",
)

# %%
meta = mixed["metadata"]
owner = [r for r, n in counts.items() for _ in range(n)]
colours = viz.colours_of(counts)
_, ax = plt.subplots(figsize=(10, 1.5))
for row, (name, pos, slot) in enumerate(zip(owner, mixed["positions"].tolist(), mixed["slots"].tolist(), strict=True)):
    ax.add_patch(plt.Rectangle((row, 0), 0.94, 1, color=colours[name]))
    ax.text(row + 0.47, 0.5, f"{name}\npos {pos}\nslot {slot}", ha="center", va="center", size=8, color="white" if name == "A2" else viz.INK)
ax.set(xlim=(0, len(owner)), ylim=(0, 1), xlabel="row of the flat batch")
ax.set_xticks([i + 0.47 for i in range(len(owner))], range(len(owner)))
ax.set_yticks([])
ax.set_title(f"query_start_loc = {list(meta.query_start_loc)}, seq_lens = {list(meta.seq_lens)}")

# %% [markdown]
# ## Is it all true?
#
# The engine against our attention by hand, against text without any cache (`generate_naive`, which recomputes
# everything), and against itself in company.

# %%
from folovllm.worker.naive import NaiveModel, generate_naive

while core.has_unfinished_requests():
    step()
oracle = llm.llm_engine.process("oracle", PROMPT, params)
naive_tokens = generate_naive(NaiveModel(model_folder), oracle)

for moment, (output, weights) in zip((first, second), by_hand, strict=True):
    torch.testing.assert_close(moment["attention"], output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:2]))
assert before == {"known": N, "computed": 0, "status": "WAITING"}
assert after_first == {"known": N + 1, "computed": N, "status": "RUNNING"}
assert first["logits"].shape == (1, arch.vocab_size) and second["qkv"].shape[0] == 1
assert int(written.sum()) == N + 1, "two steps wrote the prompt and one token, and nothing else"
assert tokenizer.decode(request.prompt_token_ids) == PROMPT and "".join(pieces) + rest == tokenizer.decode(request.output_token_ids)
assert request.output_token_ids == naive_tokens, "with a cache, without one: the same tokens"
print(f"all true: {len(naive_tokens)} tokens, {tokenizer.decode(naive_tokens)!r}")
