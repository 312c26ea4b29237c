# %% [markdown]
# # 06 · A long prompt among readers: chunked prefill
#
# Some people read answers as they are generated, and then a long prompt arrives. If it is computed whole, it makes one
# step so long that all other answers stop. If it is cut into chunks, they do not. Here the **real scheduler** cuts it.
# You turn the budget and see who gains and who pays. At the end a real (tiny) model in fp32 runs with several budgets.
#
# *25 minutes. Read [learn/05](../docs/learn/05_chunked_prefill.md) first. **Predict** asks before an experiment, and **Answer**
# follows it; `viz.ask("06.1", guess=4)` has your guess judged. Next: [07](07_prefix_cache.ipynb).*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import json
import sys
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

from matplotlib import pyplot as plt

from folovllm import LLM, SamplingParams, viz
from folovllm.core.sched.scheduler import Scheduler
from folovllm.learn.defaults import tiny_model
from folovllm.learn.three_requests import EXAMPLES, example_core, run_example
from folovllm.learn.toy_engine import make_core, make_request, steps_of
from folovllm.model_shapes import shape_architecture
from folovllm.sim.cost import Calibration, CostModel
from folovllm.sim.executor import SimExecutor, work_of
from folovllm.sim.hardware import HARDWARE

viz.style()

# %% [markdown]
# ## The three requests with a budget
#
# a (5 prompt tokens) and b (4) arrive before step 0, c (12) before step 2, as everywhere in this course. Without chunks,
# the step that admits c computes all 12 tokens of it:

# %% tags=["given"]
def three(**switches):
    """The steps of the three requests, and the same as entries that viz can draw."""
    steps = list(run_example(example_core(num_kv_blocks=10, **switches)))
    return steps, [[{"req": r, "start": s.start[r], "n": n} for r, n in s.scheduled.items()] for s in steps]


whole_steps, whole_entries = three()
for step in whole_steps:
    print(step)

# %% [markdown]
# Now the budget is 6: no step computes more than 6 tokens. Each request, in the order of admission, gets the smaller of
# what it lacks and what is left. In step 2, a and b each lack one token.

# %%
viz.ask("06.1")

# %%
viz.ask("06.2")

# %%
six_steps, six_entries = three(enable_chunked_prefill=True, max_num_batched_tokens=6)
for step in six_steps:
    print(step)

# %%
viz.answer("06.1", six_steps[2].scheduled["c"])

# %%
def first_step_of(name, steps):
    """The step in which a request got its first token."""
    return next(step.number for step in steps if step.sampled.get(name))


viz.answer("06.2", first_step_of("c", six_steps))

# %%
figure, axes = plt.subplots(2, 2, figsize=(10, 4.2), sharex=True, sharey="row", height_ratios=(1, 1.2))
colours, arrivals = viz.colours_of("abc"), {name: EXAMPLES[name].arrival for name in "abc"}
for (rows, bars), entries, title in zip(axes.T, (whole_entries, six_entries), ("whole prompts", "budget 6")):
    viz.gantt(rows, entries, arrivals, colours)
    viz.token_bars(bars, entries, colours)
    most = max(sum(entry["n"] for entry in step) for step in entries)
    rows.set_title(f"{title}: {len(entries)} steps, at most {most} tokens in one")
    bars.axhline(6, color=viz.INK, ls="--", lw=0.8)
    bars.set(xlabel="step", xlim=(0, 7), yticks=range(0, 15, 2))
axes[0, 1].set_ylabel("")
axes[1, 1].set_ylabel("");

# %% [markdown]
# A hatched cell computes as many tokens as its label says, a plain one computes one. The dashed line is the budget: on
# the right no step is above it, not even step 0, where b's prompt of 4 tokens is cut into 1 and 3.
#
# ### Your turn: other budgets
#
# In which step does c get its first token if the budget is 5, and in which if it is 3? Do it by hand, step by step: the smaller
# budget changes more than c. (a has 5 prompt tokens and generates 4, b has 4 and generates 6.)

# %%
my_first_steps = None  # a list of two steps: [with a budget of 5, with a budget of 3]

# %%
first_steps = [
    first_step_of("c", three(enable_chunked_prefill=True, max_num_batched_tokens=budget)[0]) for budget in (5, 3)
]
viz.your_turn("06.t1", my_first_steps, first_steps)

# %% [markdown]
# One function decides how much of a request a step computes, for decodes, prompts and chunks alike. `schedule()` calls it
# for each running request first, and then for the head of the queue, with what is left of the budget.

# %%
viz.source(Scheduler.num_tokens_to_compute)

# %% [markdown]
# ## What you can change: more readers, a longer prompt

# %%
READERS = 4  # short requests that are being answered
LONG_PROMPT = 40  # tokens
ARRIVES = 3  # before this step
BUDGETS = [None, 24, 8]  # None: chunked prefill off
OUTPUT = 3  # tokens that the long request generates

# %%
ROOFLINE = CostModel(shape_architecture("smollm2-135m"), HARDWARE["cpu"], Calibration(1.0, 0.0, "peak rates"))


class Watched(SimExecutor):
    """Computes nothing, but lets the modelled time of each step pass, and notes what the step computed."""

    def __init__(self):
        super().__init__(ROOFLINE)
        self.steps = []

    def execute(self, output):
        self.steps.append([{"req": r, "start": start, "n": n} for r, (start, n) in work_of(output).items()])
        return super().execute(output)


def run(load, budget, threshold=0):
    """`load`: name -> (arrives before step, prompt tokens, output tokens). Returns the steps, the steps in which each
    request got a token, and the modelled milliseconds of each step."""
    executor = Watched()
    chunks = {} if budget is None else {"enable_chunked_prefill": True, "max_num_batched_tokens": budget}
    core = make_core(
        executor, max_model_len=4096, block_size=16, num_kv_blocks=1024, max_num_seqs=64,
        long_prefill_token_threshold=threshold, **chunks,
    )  # fmt: skip
    requests = [(arrives, make_request(name, n, max_tokens=out)) for name, (arrives, n, out) in load.items()]
    got = {name: [] for name in load}
    for number in steps_of(core, requests):
        for output in core.step():
            got[output.request_id].append(number)
    return executor.steps, got, [1000 * cost.seconds for cost in executor.costs]


load = {f"reader {i + 1}": (0, 2, 14) for i in range(READERS)} | {"long": (ARRIVES, LONG_PROMPT, OUTPUT)}
colours = dict.fromkeys(load, viz.PALETTE[0]) | {"long": viz.PALETTE[2]}
arrivals = {name: arrives for name, (arrives, _, _) in load.items()}
runs = {budget: run(load, budget) for budget in BUDGETS}
name_of = {budget: "off" if budget is None else f"budget {budget}" for budget in BUDGETS}

# %%
SMALL = min(budget for budget in BUDGETS if budget)

# %%
viz.ask("06.3", READERS=READERS, LONG_PROMPT=LONG_PROMPT, SMALL=SMALL)

# %%
figure, axes = plt.subplots(len(BUDGETS), 1, figsize=(10, 2.3 * len(BUDGETS)), sharex=True)
longest = max(len(steps) for steps, _, _ in runs.values())
for ax, (budget, (steps, got, _)) in zip(axes, runs.items()):
    viz.gantt(ax, steps, arrivals, colours)
    ax.set_title(f"{name_of[budget]}: first token of the long prompt in step {got['long'][0]}")
    ax.set(xlim=(0, longest), ylabel="")
axes[-1].set_xlabel("step (hatched: that many tokens at once)");

# %%
chunks = [entry["n"] for step in runs[SMALL][0] for entry in step if entry["req"] == "long"]
viz.answer("06.3", len(chunks) - (OUTPUT - 1), READERS=READERS, SMALL=SMALL, left=SMALL - READERS)

# %%
figure, axes = plt.subplots(1, len(BUDGETS), figsize=(10, 2.6), sharex=True, sharey=True)
for ax, (budget, (steps, _, _)) in zip(axes, runs.items()):
    viz.token_bars(ax, steps, colours)
    ax.set(title=name_of[budget], xlabel="step", xlim=(0, longest), ylabel="")
axes[0].set_ylabel("tokens computed");

# %% [markdown]
# In steps the chunked runs look *worse*: the long prompt needs more of them. But a step with 44 tokens takes longer than
# one with 8.
#
# ### Your turn: the number of chunks
#
# In how many steps is a prompt computed, if `decodes` other requests decode all the time?

# %%
def num_chunks(prompt, budget, decodes):
    """Nothing else arrives, and no request ends meanwhile."""
    return None  # your code

# %%
def engine_num_chunks(prompt, budget, decodes):
    crowd = {f"reader {i}": (0, 1, 2 + prompt) for i in range(decodes)} | {"long": (2 * (decodes > 0), prompt, 1)}
    return sum(entry["req"] == "long" for step in run(crowd, budget)[0] for entry in step)


CHUNKS = [(12, 6, 2), (40, 8, 4), (900, 256, 8), (16, 8, 0), (17, 8, 0), (500, 64, 14)]
viz.your_turn("06.t2", num_chunks, [(case, engine_num_chunks(*case)) for case in CHUNKS])

# %% [markdown]
# ## From steps to milliseconds
#
# `CostModel` (notebook 02 shows its code) says how long a step takes on the reference machine of the course, 2 cores with
# 445 GFLOP/s and 34.6 GB/s: for as long as it computes, or for as long as it reads, whichever is longer. It is kind to
# small chunks: it lets computing and reading overlap perfectly, and charges nothing for a step as such. Now 8 readers, and a
# prompt of 4,000 tokens.

# %%
BIG_READERS, BIG_PROMPT, BIG_OUTPUT = 8, 4000, 60 if FAST else 300
big = {f"reader {i + 1}": (0, 2, BIG_OUTPUT) for i in range(BIG_READERS)} | {"long": (ARRIVES, BIG_PROMPT, 1)}
SWEEP = [None, 1024, 256, 64] if FAST else [None, 2048, 1024, 512, 256, 128, 64, 32, 16]


def measure(budget):
    steps, got, times = run(big, budget)
    first = got["long"][0]
    return {
        "itl": times[ARRIVES:],
        "worst": max(times[ARRIVES:]),
        "ttft": sum(times[ARRIVES : first + 1]),
    }

# %%
viz.ask("06.4")

# %%
viz.ask("06.5", small=min(budget for budget in SWEEP if budget))

# %%
viz.ask("06.6")

# %%
swept = {budget: measure(budget) for budget in SWEEP}

# %%
figure, ax = plt.subplots(figsize=(10, 3.4))
for budget, colour in zip([None, 1024, 256, 64], viz.PALETTE):
    gaps, clock, xs = swept[budget]["itl"], 0.0, []
    for gap in gaps:
        clock += gap
        xs.append(clock)
    ax.plot(xs, gaps, ".-", ms=4, lw=0.8, color=colour)
    label = "off" if budget is None else f"budget {budget:,}"
    ax.annotate(label, (xs[0], gaps[0]), (5, 6), textcoords="offset points", color=colour)
ax.set(yscale="log", xlim=(0, 4500), xlabel="ms after the long prompt arrived (modelled)", ylabel="ms since the last token",
       title="what a reader of one of the eight answers sees: each dot is a token")  # fmt: skip
ax.set_yticks([10, 100, 1000], ["10", "100", "1,000"]);

# %%
viz.answer("06.4", swept[256]["itl"][14] / swept[256]["itl"][0])

# %% [markdown]
# ## Who gains, who pays

# %%
rows = [["off" if budget is None else budget, round(m["worst"]), round(m["ttft"])] for budget, m in swept.items()]
viz.table(["budget", "longest gap of a reader, ms", "first token of the long prompt, ms"], rows)

# %%
small = min(budget for budget in swept if budget)
longer = [swept[small][who] > swept[None][who] for who in ("worst", "ttft")]
viz.answer("06.5", longer, small=small, left=small - BIG_READERS, BIG_READERS=BIG_READERS)

# %%
viz.answer("06.6", swept[256]["ttft"] / swept[None]["ttft"])

# %% [markdown]
# ## Modelled and measured
#
# The same kind of load on the real engine, measured once with `scripts/tune_chunk_size.py` (8 readers, four prompts of
# 4,000 tokens one after the other, real model in bf16). The model is the roofline: attention does not reach the peak rate,
# and a step has overhead, so every measured point is above it. At a budget of 64 the measured TTFT is high for another
# reason: a prompt takes 72 steps there, and the next one arrives after 64, so it has to queue. (The model has one prompt.)

# %%
MEASURED = json.loads((ROOT / "milestones/m5/results/tune_chunk_size.json").read_text())["results"]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), sharex=True)
budgets = [b for b in swept if b]
for ax, name, ours, title in (
    (left, "itl_p99_ms", "worst", "gap of a reader, ms (measured: p99, modelled: longest)"),
    (right, "ttft_long_ms", "ttft", "first token of the long prompt, ms"),
):
    ax.plot(budgets, [swept[b][ours] for b in budgets], "o-", color=viz.PALETTE[5], ms=4)
    ax.plot([m["budget"] for m in MEASURED], [m[name] for m in MEASURED], "s-", color=viz.PALETTE[0], ms=4)
    ax.axhline(swept[None][ours], color=viz.INK, ls=":", lw=1)
    ax.set(xscale="log", yscale="log", xlabel="budget", title=title)
    ax.set_xticks([16, 64, 256, 1024], ["16", "64", "256", "1,024"])
    ax.minorticks_off()
    ax.grid(alpha=0.25)
left.text(150, 600, "measured", color=viz.PALETTE[0], ha="right")
left.text(400, 150, "modelled", color=viz.PALETTE[5])
left.text(16, swept[None]["worst"] * 0.9, "off (modelled)", va="top")
left.set_yticks([10, 100, 1000], ["10", "100", "1,000"])
right.text(100, 6000, "measured", color=viz.PALETTE[0])
right.text(200, 3600, "modelled", color=viz.PALETTE[5])
right.set_ylim(2500, 9000)
right.set_yticks([3000, 5000, 8000], ["3,000", "5,000", "8,000"]);

# %% [markdown]
# ### Your turn: choose a budget
#
# You promised your users that 99 % of the gaps stay below **250 ms**. Of the *measured* budgets that keep the promise,
# which one gives long prompts their first token soonest? `MEASURED` is a list of dicts; look at `MEASURED[0]`.

# %%
my_budget = None  # a number, or code

# %%
kept = [point for point in MEASURED if point["itl_p99_ms"] <= 250]
viz.your_turn("06.t3", my_budget, min(kept, key=lambda point: point["ttft_long_ms"])["budget"])

# %% [markdown]
# ## Two prompts: the threshold
#
# A short prompt (40 tokens) arrives together with a long one (1,000), just behind it. The budget is 128.
# `long_prefill_token_threshold` caps what one request may take of a step.

# %%
viz.ask("06.7")

# %%
crowd = {"long": (0, 1000, 2), "short": (0, 40, 8)}

# %%
viz.ask("06.9")

# %%
crowd_runs = {threshold: run(crowd, 128, threshold) for threshold in (0, 64)}
first = {threshold: {name: got[name][0] for name in crowd} for threshold, (_, got, _) in crowd_runs.items()}

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharex=True, sharey=True)
crowd_colours = {"long": viz.PALETTE[2], "short": viz.PALETTE[5]}
for ax, (threshold, (steps, _, _)) in zip(axes, crowd_runs.items()):
    viz.token_bars(ax, steps, crowd_colours)
    answers_in = first[threshold]["short"]
    ax.annotate("short prompt:\nfirst token", (answers_in + 0.6, 17 if threshold == 0 else 100), (answers_in + 2.5, 100),
                arrowprops={"arrowstyle": "->", "color": viz.INK}, va="center")  # fmt: skip
    ax.set(xlabel="step", xlim=(0, 18), ylim=(0, 140), ylabel="")
    ax.set_title(f"threshold {threshold or 'off'}: the short one answers in step {answers_in}")
axes[0].set_ylabel("tokens computed");

# %%
viz.answer("06.7", first[0]["short"])

# %%
viz.answer("06.9", first[64]["long"], without=first[0]["long"])

# %% [markdown]
# (After its first token, the short request adds a single token to a step, which is too thin to be seen.)
#
# ## The same with a real model: do the tokens change?
#
# A Llama of two layers with random weights, fp32, on the whole engine: greedy and seeded requests. The preset is m3, with the
# textbook attention, and chunks are switched on by hand.

# %%
import torch

torch.set_num_threads(1)
requests = [
    ([(31 * i + 7 * j) % 500 for j in range(3 + 9 * i)],
     SamplingParams(max_tokens=12, ignore_eos=True, temperature=i % 2, seed=i, detokenize=False))
    for i in range(6)
]  # fmt: skip
tokens, steps_needed = {}, {}
for budget in (None, 64, 16, 7, 1):
    chunks = {"enable_chunked_prefill": budget is not None, "max_num_batched_tokens": budget}
    llm = LLM(
        tiny_model(), preset="m3", dtype="float32", device="cpu", max_model_len=128, num_kv_blocks=80,
        skip_tokenizer_init=True, **chunks,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    answers = llm.generate(prompts, [params for _, params in requests], use_tqdm=False)
    tokens[budget] = [answer.outputs[0].token_ids for answer in answers]
    steps_needed[budget] = llm.stats().num_steps

# %%
viz.ask("06.8")

# %%
viz.table(
    ["budget", "steps", "same tokens as whole prompts"],
    [["off" if b is None else b, n, "yes" if tokens[b] == tokens[None] else "no"] for b, n in steps_needed.items()],
)

# %%
viz.answer("06.8", sum(tokens[b] != tokens[None] for b in tokens))

# %% [markdown]
# ## Is it all true?

# %%
if viz.as_delivered("06", globals()):
    assert [step.scheduled.get("c") for step in six_steps] == [None, None, 4, 4, 4, 1, None]
    for budget, (steps, got, _) in runs.items():
        assert budget is None or all(sum(e["n"] for e in step) <= budget for step in steps), "over budget"
        for name in load:
            assert got[name] == list(range(got[name][0], got[name][0] + len(got[name]))), "a decode missed a step"
        sizes = [e["n"] for step in steps for e in step if e["req"] == "long"]
        assert sum(sizes) == LONG_PROMPT + 2, "no token is computed twice"
    assert runs[None][1]["long"][0] == ARRIVES
    assert runs[8][1]["long"][0] == ARRIVES + -(-LONG_PROMPT // (8 - READERS)) - 1
    assert swept[256]["worst"] < swept[None]["worst"] / 8 and swept[256]["ttft"] < 1.05 * swept[None]["ttft"]
    assert all(m["itl_p99_ms"] > swept[m["budget"]]["worst"] for m in MEASURED if m["budget"] in swept)
    assert first[64]["short"] == 0 < first[0]["short"]
    assert all(t == tokens[None] for t in tokens.values()) and len({tuple(t) for t in tokens[None]}) == 6
    assert sorted(steps_needed.values()) == list(steps_needed.values())
    print("all true: one set of tokens for", len(tokens), "budgets")
