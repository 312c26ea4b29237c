# %% [markdown]
# # 06 · A long prompt among readers: chunked prefill
#
# Eight people read answers as they are written; a ninth pastes a long text. Computed whole, it makes one step so long
# that everybody else's text stands still. Cut into chunks it does not. Here the **real scheduler** cuts it, with a
# model without weights; you turn the budget and see who gains, who pays, and what it does to throughput. At the end a
# tiny real model in fp32 shows that the tokens stay the same.
#
# *10 minutes. To read with it: `docs/learn/05_chunked_prefill.md` and `folovllm/core/sched/scheduler.py`.*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import json
import sys
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

from matplotlib import pyplot as plt

from folovllm import SamplingParams, viz
from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.hf_config import parse_hf_config
from folovllm.request import Request

viz.style()

# %% [markdown]
# ## What you can turn

# %%
DECODES = 4  # short requests that are being answered
LONG_PROMPT = 40  # tokens
ARRIVES = 3  # before this step
BUDGETS = [None, 24, 8]  # None: chunked prefill off

# %%
arch = parse_hf_config(json.load(open(ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json")))


def make_core(budget, threshold=0):
    config = EngineConfig.from_args(
        preset="m4", attention_backend="torch_naive", max_num_seqs=64, num_kv_blocks=1024, max_model_len=8192,
        enable_chunked_prefill=budget is not None, max_num_batched_tokens=budget,
        long_prefill_token_threshold=threshold,
    )  # fmt: skip
    return EngineCore(config.resolve(arch, "cpu"), FakeExecutor())


def prompt_of(name, length):
    return [(sum(map(ord, name)) * 31 + 7 * i) % 1000 for i in range(length)]


def run(load, budget, threshold=0):
    """`load`: name -> (arrives before step, prompt tokens, output tokens). What each step computed, as entries
    {"req", "start", "n"}, and the steps in which each request got a token."""
    core, steps, got, waiting = make_core(budget, threshold), [], {name: [] for name in load}, dict(load)
    outputs = {name: [] for name in load}
    while waiting or core.has_unfinished_requests():
        for name in [n for n, (arrives, _, _) in waiting.items() if arrives <= len(steps)]:
            _, prompt, output = waiting.pop(name)
            params = SamplingParams(max_tokens=output, ignore_eos=True)
            core.add_request(Request(name, prompt_of(name, prompt), params))
        scheduled = core.scheduler.schedule()
        requests = core.scheduler.requests  # schedule() has already counted the new tokens as computed
        counts = scheduled.num_scheduled_tokens
        steps.append([{"req": r, "start": requests[r].num_computed_tokens - n, "n": n} for r, n in counts.items()])
        sampled = core.executor.sample(core.executor.execute(scheduled))
        for output in core.scheduler.update_from_output(scheduled, sampled):
            got[output.request_id].append(len(steps) - 1)
            outputs[output.request_id] += output.new_token_ids
    for name, (_, prompt, output) in load.items():
        assert outputs[name] == fake_tokens(prompt_of(name, prompt), output), "a wrong chunk gives wrong tokens"
    return steps, got


load = {f"d{i}": (0, 2, 14) for i in range(DECODES)} | {"long": (ARRIVES, LONG_PROMPT, 3)}
colours = viz.colours_of(load)
arrivals = {name: arrives for name, (arrives, _, _) in load.items()}
runs = {budget: run(load, budget) for budget in BUDGETS}
name_of = {budget: "off" if budget is None else f"budget {budget}" for budget in BUDGETS}

# %%
viz.predict(
    f"{DECODES} requests decode, and a prompt of {LONG_PROMPT} arrives. Budget 8: in how many steps is it computed?",
    None, sum(e["req"] == "long" and e["n"] > 1 for step in runs[8][0] for e in step),
    f"The decodes take {DECODES} of the 8 tokens of each step, so {8 - DECODES} are left for the prompt.",
)  # fmt: skip

# %%
figure, axes = plt.subplots(len(BUDGETS), 1, figsize=(10, 2.6 * len(BUDGETS)), layout="constrained")
for ax, (budget, (steps, got)) in zip(axes, runs.items()):
    viz.gantt(ax, steps, arrivals, colours)
    ax.set_title(f"{name_of[budget]}: first token of the long prompt in step {got['long'][0]}", loc="left")
axes[-1].set_xlabel("step (hatched: that many tokens at once)");

# %% [markdown]
# In steps the chunked runs look *worse*: the long prompt needs more of them. But steps are not seconds. Look at what
# each step has to compute:

# %%
figure, axes = plt.subplots(1, len(BUDGETS), figsize=(10, 2.6), sharey=True, layout="constrained")
for ax, (budget, (steps, _)) in zip(axes, runs.items()):
    viz.token_bars(ax, steps, colours)
    ax.set(title=name_of[budget], xlabel="step")

# %% [markdown]
# ## From steps to milliseconds
#
# A model of a step on a small machine: the larger of *computing* (two operations per parameter and token, and
# attention over all that came before) and *reading* (all weights once, and the K/V). It is kind to small chunks: real
# kernels do not overlap so well, and a step costs something in itself. For measurements there is
# `scripts/tune_chunk_size.py`.

# %%
OPERATIONS, BANDWIDTH = 0.85e12, 39e9  # per second, two cores
BODY, WEIGHTS, KV = 106_202_880, 2 * 134_515_008, 23_040  # SmolLM2-135M, bf16: parameters, bytes, bytes per token


def step_ms(step):
    matrices = 2 * BODY * sum(e["n"] for e in step)
    attention = 4 * 576 * 30 * sum(e["n"] * (e["start"] + (e["n"] + 1) / 2) for e in step)
    read = WEIGHTS + KV * sum(e["start"] + e["n"] for e in step)
    return 1000 * max((matrices + attention) / OPERATIONS, read / BANDWIDTH)


BIG_DECODES, BIG_PROMPT, BIG_OUTPUT = 8, 4000, 60 if FAST else 300
big = {f"d{i}": (0, 2, BIG_OUTPUT) for i in range(BIG_DECODES)} | {"long": (ARRIVES, BIG_PROMPT, 1)}
SWEEP = [None, 1024, 256, 64] if FAST else [None, 2048, 1024, 512, 256, 128, 64, 32, 16]


def measure(budget):
    steps, got = run(big, budget)
    times = [step_ms(step) for step in steps]
    first = got["long"][0]
    return {
        "itl": times[ARRIVES:],
        "worst": max(times[ARRIVES:]),
        "ttft": sum(times[ARRIVES : first + 1]),
        "all": sum(times),
    }


swept = {budget: measure(budget) for budget in SWEEP}

# %%
figure, ax = plt.subplots(figsize=(10, 3), layout="constrained")
for budget, colour in zip([None, 1024, 256, 64], viz.PALETTE):
    gaps, clock, xs = swept[budget]["itl"], 0.0, []
    for gap in gaps:
        clock += gap
        xs.append(clock)
    ax.plot(xs, gaps, ".-", ms=3, lw=0.8, color=colour, label="off" if budget is None else f"budget {budget}")
ax.set(yscale="log", xlim=(0, 2500), xlabel="ms after the long prompt arrived", ylabel="ms since the last token",
       title="what a reader of one of the eight answers sees: each dot is a token")  # fmt: skip
ax.legend();

# %%
viz.predict(
    "Chunks of one budget have equally many tokens. Do they take the same time?", ["yes", "no, longer and longer"],
    "no, longer and longer" if swept[256]["itl"][14] > 1.5 * swept[256]["itl"][0] else "yes",
    "The matrices cost the same, but attention reads all that was computed before. See the slope of the dots.",
)  # fmt: skip

# %% [markdown]
# ## Who gains, who pays

# %%
rows = [["off" if b is None else b, round(m["worst"]), round(m["ttft"]), round(m["all"])] for b, m in swept.items()]
viz.table(["budget", "worst gap of a decode, ms", "first token of the long prompt, ms", "everything done, ms"], rows)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for budget, m in swept.items():
    colour = viz.PALETTE[5] if budget is None else viz.PALETTE[0]
    label = "off" if budget is None else str(budget)
    left.plot(m["worst"], m["ttft"], "o", color=colour)
    left.annotate(label, (m["worst"], m["ttft"]), textcoords="offset points", xytext=(4, 4), size=8)
    right.plot(m["worst"], m["all"], "o", color=colour)
    right.annotate(label, (m["worst"], m["all"]), textcoords="offset points", xytext=(4, 4), size=8)
left.set(xscale="log", xlabel="worst gap of a decode, ms", ylabel="TTFT of the long prompt, ms", title="the trade")
right.set(xscale="log", xlabel="worst gap of a decode, ms", ylabel="everything done, ms", title="throughput")
for ax in (left, right):
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])

# %% [markdown]
# The trade is lopsided: from "off" to 256 the readers' worst gap falls to a tenth, and the long prompt waits a few
# percent longer. Only tiny budgets make it pay. And why does throughput *rise*? A decode step waits for memory while
# its arithmetic units are idle; the chunk beside it uses them. (Real kernels gain less.)

# %%
small = min(b for b in swept if b)
viz.predict(
    f"With a budget of {small} and 8 decodes: who waits longer than without chunks?",
    ["the readers", "the long prompt", "both", "nobody"],
    {(True, True): "both", (True, False): "the readers", (False, True): "the long prompt", (False, False): "nobody"}[
        swept[small]["worst"] > swept[None]["worst"], swept[small]["ttft"] > swept[None]["ttft"]
    ],
    "The readers' gaps are as long as a step; the prompt needs many steps, each of which reads all weights again.",
)  # fmt: skip

# %% [markdown]
# ## Two prompts: the threshold
#
# A short prompt arrives behind a long one. With a budget alone it waits for all of it. `long_prefill_token_threshold`
# caps what one request may take of a step.

# %%
crowd = {"long": (0, 1000, 2), "short": (0, 40, 8)}
figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True, layout="constrained")
first = {}
for ax, threshold in zip(axes, [0, 64]):
    steps, got = run(crowd, 128, threshold)
    first[threshold] = {name: got[name][0] for name in crowd}
    viz.token_bars(ax, steps, viz.colours_of(crowd))
    answers_in = first[threshold]["short"]
    ax.set(xlabel="step", title=f"threshold {threshold or 'off'}: the short one answers in step {answers_in}")

# %% [markdown]
# ## The same with a real model: do the tokens change?
#
# A Llama of two layers with random weights, fp32, on the whole engine: greedy and seeded requests, one budget after
# the other.

# %%
import contextlib
import io
import tempfile

import torch

from folovllm import LLM
from tests.tiny_models import make_tiny

torch.set_num_threads(1)
with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
    model = make_tiny("llama", Path(folder))
    requests = [
        (f"p{i}", 3 + 9 * i, SamplingParams(max_tokens=12, ignore_eos=True, temperature=i % 2, seed=i))
        for i in range(6)
    ]
    tokens, steps_needed = {}, {}
    for budget in (None, 64, 16, 7, 1):
        chunks = {"enable_chunked_prefill": budget is not None, "max_num_batched_tokens": budget}
        llm = LLM(str(model), preset="m4", dtype="float32", max_model_len=128, **chunks)
        prompts = [{"prompt_token_ids": [t % 250 + 3 for t in prompt_of(name, length)]} for name, length, _ in requests]
        answers = llm.generate(prompts, [params for _, _, params in requests], use_tqdm=False)
        tokens[budget] = [answer.outputs[0].token_ids for answer in answers]
        steps_needed[budget] = llm.stats().num_steps
viz.table(
    ["budget", "steps", "same tokens as whole prompts"],
    [["off" if b is None else b, n, "yes" if tokens[b] == tokens[None] else "no"] for b, n in steps_needed.items()],
)

# %% [markdown]
# ## Is it all true?

# %%
for budget, (steps, got) in runs.items():
    assert budget is None or all(sum(e["n"] for e in step) <= budget for step in steps), "over budget"
    for name in load:
        assert got[name] == list(range(got[name][0], got[name][0] + len(got[name]))), "a decode missed a step"
    parts = [e["n"] for step in steps for e in step if e["req"] == "long"]
    assert sum(parts) == LONG_PROMPT + 2, "nothing is computed twice"
assert runs[None][1]["long"][0] == ARRIVES
assert runs[8][1]["long"][0] == ARRIVES + -(-LONG_PROMPT // (8 - DECODES)) - 1
assert swept[256]["worst"] < swept[None]["worst"] / 8 and swept[256]["ttft"] < 1.05 * swept[None]["ttft"]
assert first[64]["short"] == 0 < first[0]["short"]
assert all(t == tokens[None] for t in tokens.values()) and len({tuple(t) for t in tokens[None]}) == 6
assert sorted(steps_needed.values()) == list(steps_needed.values())
print("all true: one set of tokens for", len(tokens), "budgets")
