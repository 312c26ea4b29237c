# %% [markdown]
# # 03 · Who computes when: the scheduler as a picture
#
# In every step the scheduler decides which requests take part and how many tokens each of them computes. Here the **real
# scheduler** decides it three times for the same requests: one at a time, as a static batch, and continuously. The model
# is replaced by recorded or computed tokens, so a whole schedule takes milliseconds, and a wrong one gives wrong tokens.
#
# Why share steps at all? With plain torch, a step of 32 requests takes 4.7 times as long as a step of one request and makes
# 32 times as many tokens (`milestones/m4/results/profile_step.json`). Sharing is not free, but it is cheap.
#
# *15 minutes. The page that belongs to it: [docs/learn/02_continuous_batching.md](../docs/learn/02_continuous_batching.md).
# Next: [04](04_block_tables.ipynb).*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import json
import random
import sys
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

from matplotlib import pyplot as plt

from folovllm import viz
from folovllm.core.sched.scheduler import Scheduler
from folovllm.learn.three_requests import EXAMPLES, example_core, run_example
from folovllm.learn.toy_engine import expected_tokens, make_core, make_request, schedule_and_run, steps_of
from folovllm.sim.hardware import HARDWARE

viz.style()

# %% [markdown]
# ## Three requests and two seats
#
# These are the three requests of all learning pages. A *seat* is one of the `max_num_seqs` places in a batch. The first
# token of an answer comes out of the step that computes the prompt, so one at a time takes as many steps as there are
# tokens to generate. A static batch admits requests only when the last batch is over.

# %%
viz.table(
    ["request", "prompt", "prompt tokens", "tokens to generate", "arrives before step"],
    [[name, e.text, len(e.prompt_token_ids), e.max_tokens, e.arrival] for name, e in EXAMPLES.items()],
)

# %%
POLICIES = {
    "one at a time": {"max_num_seqs": 1, "batching": "static"},
    "static, 2 seats": {"max_num_seqs": 2, "batching": "static"},
    "continuous, 2 seats": {"max_num_seqs": 2, "batching": "continuous"},
}
BLOCK = 16  # tokens: one block holds a whole request, as in M2
three = {name: list(run_example(example_core(block_size=BLOCK, **args))) for name, args in POLICIES.items()}
colours = viz.colours_of(EXAMPLES)
arrivals = {name: example.arrival for name, example in EXAMPLES.items()}


def entries(steps):
    """Which request computes how many tokens, for every step: what the helpers of viz draw."""
    return [[{"req": name, "n": n} for name, n in step.scheduled.items()] for step in steps]


viz.predict(
    f"One at a time takes {len(three['one at a time'])} steps. How many does the static batch take with two seats?",
    [6, 8, 10, 12],
    len(three["static, 2 seats"]),
    "a and b run together until the longer one, b, has made its 6 tokens. Then c takes 2 steps alone.",
)

# %%
continuous = three["continuous, 2 seats"]
viz.predict(
    "And continuous batching: in which step does c compute its prompt?",
    [2, 3, 4, 6],
    next(step.number for step in continuous if "c" in step.scheduled),
    "a makes its fourth token in step 3 and is done. Its seat is free in step 4.",
)

# %%
longest = max(len(steps) for steps in three.values())
figure, axes = plt.subplots(3, 1, figsize=(10, 5.4), sharex=True, sharey=True)
for ax, (name, steps) in zip(axes, three.items()):
    viz.gantt(ax, entries(steps), arrivals, colours)
    ax.set_title(f"{name}: {len(steps)} steps")
axes[-1].set(xlim=(0, longest), xlabel="step (hatched: a prompt of that many tokens; grey line: waiting)")
axes[-1].set_xticks([n + 0.5 for n in range(longest)], [str(n) for n in range(longest)]);
# %%
viz.predict(
    "Which of the three policies computes the fewest tokens in total?",
    ["one at a time", "static", "continuous", "all the same"],
    "all the same" if len({sum(sum(s.scheduled.values()) for s in steps) for steps in three.values()}) == 1 else "?",
    "Batching does not save work per token. It saves passes over the weights.",
)

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), sharex=True, sharey=True)
for ax, (name, steps) in zip(axes, three.items()):
    viz.token_bars(ax, entries(steps), colours)
    ax.set(title=name, xlabel="step")
    ax.label_outer()
axes[0].set_xlim(0, longest)
rows = [
    [name, len(steps), sum(sum(s.scheduled.values()) for s in steps), sum(len(s.sampled) for s in steps) / len(steps)]
    for name, steps in three.items()
]
viz.table(["", "steps", "tokens computed", "output tokens per step"], rows)

# %% [markdown]
# All panels have the same axes and the same coloured area. Deciding anew before every forward pass is called
# *iteration-level scheduling*; the idea is Orca's (OSDI 2022), and vLLM builds on it.
#
# ## The code that decided
#
# There are no phases. A request has *known* tokens (prompt and output) and *computed* ones (their K/V are in the cache),
# and a step lets computed catch up with known.

# %%
viz.source(Scheduler.schedule)

# %%
viz.source(Scheduler.num_tokens_to_compute)


# %% [markdown]
# **Your turn.** Write the rule in your own words: how many tokens does a step give to a request? Leave the threshold out.
# Run the cell; it compares your function with the engine's.


# %%
def my_gap(known, computed, budget, chunked):
    """Tokens that this step computes. `budget` is what is left of it; `chunked`: prompts may be cut."""
    return None  # your code


def engine_gap(known, computed, budget, chunked):
    scheduler = make_core(max_model_len=64, enable_chunked_prefill=chunked, max_num_batched_tokens=64).scheduler
    return scheduler.num_tokens_to_compute(make_request("x", known), computed, budget)


CASES = [
    (5, 0, 64, False),
    (6, 5, 64, False),
    (13, 0, 64, False),
    (12, 0, 6, False),
    (12, 0, 6, True),
    (12, 4, 6, True),
    (12, 8, 6, True),
]
viz.your_turn(
    "my_gap", my_gap, [(case, engine_gap(*case)) for case in CASES],
    hint="the gap is known - computed; if it exceeds the budget, the answer depends on whether prompts may be cut",
)  # fmt: skip

# %% [markdown]
# ## Seven requests, three seats
#
# Change the requests, the seats or the token budget, and run the cells below again.

# %%
REQUESTS = {  # name: (arrives before step, prompt tokens, output tokens)
    "a": (0, 6, 4),
    "b": (0, 3, 14),
    "c": (0, 9, 3),
    "d": (0, 4, 8),
    "e": (2, 7, 5),
    "f": (5, 2, 9),
    "g": (6, 5, 3),
}
SEATS = 3
TOKEN_BUDGET = 64  # tokens that a step may compute


# %%
def run(requests=REQUESTS, **engine_args):
    """Runs the requests to their ends: the entries of every step, each request's tokens, and the core."""
    args = {"max_model_len": TOKEN_BUDGET, "max_num_batched_tokens": TOKEN_BUDGET, "block_size": 4} | engine_args
    core = make_core(**args)
    made = {name: make_request(name, prompt, output) for name, (_, prompt, output) in requests.items()}
    steps = []
    for _ in steps_of(core, [(requests[name][0], request) for name, request in made.items()]):
        scheduled = schedule_and_run(core).num_scheduled_tokens
        steps.append([{"req": name, "n": n} for name, n in scheduled.items()])
    return steps, {name: request.output_token_ids for name, request in made.items()}, core


seven = {
    "one at a time": run(batching="static", max_num_seqs=1),
    f"static, {SEATS} seats": run(batching="static", max_num_seqs=SEATS),
    f"continuous, {SEATS} seats": run(batching="continuous", max_num_seqs=SEATS),
}
counts = [len(steps) for steps, _, _ in seven.values()]
viz.predict(
    f"The outputs together are {counts[0]} tokens. How many steps does the static batch need with {SEATS} seats?",
    None, counts[1], "Add the longest output of each batch: a, b, c, then d, e, f, then g.",
)  # fmt: skip

# %%
viz.predict(
    "And how many does continuous batching need?", None, counts[2],
    "More than the tokens divided by the seats: at the end there are fewer requests than seats.",
)  # fmt: skip

# %%
seven_arrivals, seven_colours = {name: r[0] for name, r in REQUESTS.items()}, viz.colours_of(REQUESTS)
figure, axes = plt.subplots(3, 1, figsize=(10, 8), sharex=True, sharey=True)
for ax, (name, (steps, _, _)) in zip(axes, seven.items()):
    viz.gantt(ax, steps, seven_arrivals, seven_colours)
    busy = sum(len(step) for step in steps) / (len(steps) * max(len(step) for step in steps))
    ax.set_title(f"{name}: {len(steps)} steps, {busy:.0%} of the seats in use")
axes[-1].set(xlim=(0, max(counts)), xlabel="step (hatched: a prompt of that many tokens; grey line: waiting)");

# %% [markdown]
# **Your turn.** All requests arrive together, and memory and budget suffice. How many steps does a static batch take? Write
# it as a function of the output lengths. It is compared with the engine on random requests.


# %%
def my_static_steps(outputs, seats):
    """Steps that static batching takes for these output lengths, in the order of arrival."""
    return None  # your code


def engine_static_steps(outputs, seats):
    requests = {f"r{i}": (0, 1, output) for i, output in enumerate(outputs)}
    return len(run(requests, batching="static", max_num_seqs=seats)[0])


rng = random.Random(1)
crowds = [([rng.randint(1, 9) for _ in range(rng.randint(1, 9))], rng.randint(1, 4)) for _ in range(8)]
viz.your_turn(
    "my_static_steps", my_static_steps, [(crowd, engine_static_steps(*crowd)) for crowd in crowds],
    hint="cut the list into groups of `seats` and add the longest output of each group",
)  # fmt: skip

# %% [markdown]
# ## When memory runs out: preemption
#
# With small blocks a request is admitted if its *present* length fits. The three requests again, with blocks of 4 tokens and
# only 6 of them. In step 5, b and c both need one more block, and one is free. The scheduler asks for b first.

# %%
tight = example_core(block_size=4, num_kv_blocks=7)  # block 0 is the null block
tight_steps = list(run_example(tight))
viz.predict(
    "b takes the free block. c needs one, too. What happens to c?",
    ["it waits for one step and keeps its blocks", "it is preempted and loses its blocks", "b is preempted for it"],
    "it is preempted and loses its blocks" if tight_steps[5].preempted == ["c"] else "?",
    "The victim is the request that was admitted last. That is c itself.",
)

# %%
viz.predict(
    "c had 12 prompt tokens and had sampled one token. How many tokens does it compute when it returns?",
    [1, 12, 13],
    tight_steps[6].scheduled["c"],
    "Prompt and output in one go. If it counted only the prompt, the K/V of its first output token would be missing.",
)

# %%
viz.source(Scheduler.allocate_or_preempt)

# %%
figure, ax = plt.subplots(figsize=(10, 2.2))
viz.gantt(ax, entries(tight_steps), arrivals, colours)
ax.set_xticks([n + 0.5 for n in range(len(tight_steps))], [str(n) for n in range(len(tight_steps))])
ax.set(
    xlabel="step (grey line: waiting)",
    title="6 usable blocks of 4 tokens: c is admitted in step 4, preempted in step 5, resumed in step 6",
)
for step in tight_steps[4:]:
    print(step)

# %% [markdown]
# **Your turn.** How many blocks of 4 tokens does the cache need so that the three requests run *without* a preemption? Find the
# smallest `num_kv_blocks` (the null block counts). `example_core` and `run_example` are all you need; a step knows `preempted`.

# %%
my_num_kv_blocks = None  # your answer


def preempts(num_kv_blocks):
    return any(step.preempted for step in run_example(example_core(block_size=4, num_kv_blocks=num_kv_blocks)))


fewest = next(n for n in range(7, 20) if not preempts(n))
viz.your_turn(
    "the smallest cache without a preemption", my_num_kv_blocks, fewest,
    hint="try 7, 8, 9, ...: any(step.preempted for step in run_example(example_core(block_size=4, num_kv_blocks=...)))",
)  # fmt: skip

# %% [markdown]
# ## More requests than memory
#
# Four requests that each want 20 tokens, and a cache in which at most two of them can finish side by side.

# %%
GREEDY_ONES = {name: (0, 6, 20) for name in "abcd"}
BLOCKS = 18  # one is the null block; a finished request holds 7

greedy_steps, greedy_tokens, greedy_core = run(GREEDY_ONES, num_kv_blocks=BLOCKS, max_num_seqs=4)
preemptions = greedy_core.stats().num_preemptions
alone = {name: expected_tokens(make_request(name, 6, 20), TOKEN_BUDGET) for name in GREEDY_ONES}
viz.predict(
    "Do preempted requests get other tokens than they would get alone?", ["yes", "no"],
    "no" if greedy_tokens == alone else "yes",
    "They keep the tokens they had and compute the same K/V again. What they lose is time.",
)  # fmt: skip

# %%
figure, ax = plt.subplots(figsize=(10, 2.6))
viz.gantt(ax, greedy_steps, {name: 0 for name in GREEDY_ONES}, viz.colours_of(GREEDY_ONES))
ax.set(
    xlabel="step (a second hatched cell: the request is back, and computes prompt and output again)",
    title=f"{BLOCKS - 1} usable blocks of 4 tokens: {preemptions} preemptions",
);

# %% [markdown]
# ## More seats: when does it stop helping?
#
# 32 requests arrive together. More seats mean fewer steps, but a step with more tokens takes longer. The model of the
# reference machine says how long: until all bytes have arrived, or until the arithmetic is done, whichever is later. It
# leaves out everything else, so real steps are longer (1.4 to 7 times, see the page).

# %%
cpu = HARDWARE["cpu"]
WEIGHTS = 134_515_008  # parameters of SmolLM2-135M; 2 bytes each in bf16
seat_counts = [1, 2, 4, 8, 16, 32]
crowd_size = 16 if FAST else 32
rng = random.Random(0)
crowd = {f"r{i}": (0, rng.randint(2, 20), rng.randint(2, 30)) for i in range(crowd_size)}


def model_ms(step):
    """One step with short contexts: the weights once, and a multiply and an add per weight and token."""
    tokens = sum(entry["n"] for entry in step)
    return 1000 * max(2 * WEIGHTS / cpu.bandwidth, 2 * WEIGHTS * tokens / cpu.flops)


def crowd_runs(batching):
    """Steps, and modelled seconds, for every number of seats."""
    args = {"batching": batching, "max_num_batched_tokens": 1024}  # the seats are the only limit
    all_steps = [run(crowd, max_num_seqs=seats, **args)[0] for seats in seat_counts]
    return [len(steps) for steps in all_steps], [sum(map(model_ms, steps)) / 1000 for steps in all_steps]


static_steps, static_seconds = crowd_runs("static")
continuous_steps, continuous_seconds = crowd_runs("continuous")
gain = continuous_seconds[4] / continuous_seconds[5]  # from 16 to 32 seats
viz.predict(
    f"{cpu.name}: 16 seats take {continuous_steps[4]} steps, 32 seats {continuous_steps[5]}. How much faster is the modelled run?",
    ["less than 1.3 times", "1.3 to 2 times", "more than 2 times"],
    "less than 1.3 times" if gain < 1.3 else "1.3 to 2 times" if gain <= 2 else "more than 2 times",
    f"{gain:.2f} times. From {cpu.knee:.0f} tokens in a step on, this machine waits for its arithmetic, and more seats save nothing.",
)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), sharex=True)
for ax, what, static, continuous_ in (
    (left, "steps", static_steps, continuous_steps),
    (right, "modelled seconds", static_seconds, continuous_seconds),
):
    ax.plot(seat_counts, static, "o--", color=viz.PALETTE[5])
    ax.plot(seat_counts, continuous_, "o-", color=viz.PALETTE[2])
    ax.text(2, static[1] * 1.08, "static", color=viz.PALETTE[5], ha="left", va="bottom")
    ax.text(2, continuous_[1] * 0.9, "continuous", color=viz.PALETTE[2], ha="right", va="top")
    ax.set(xscale="log", yscale="log", xlabel="seats", title=f"{what} for {crowd_size} requests")
    ax.set_xticks(seat_counts, [str(n) for n in seat_counts])
    ticks = [30, 60, 120, 250, 500] if ax is left else [0.6, 0.8, 1, 1.5, 2, 3, 4]
    ax.set_yticks(ticks, [str(n) for n in ticks])
    ax.minorticks_off()
viz.table(
    ["seats", *map(str, seat_counts)],
    [
        ["static, steps", *static_steps],
        ["continuous, steps", *continuous_steps],
        ["continuous, modelled seconds", *continuous_seconds],
    ],
)

# %% [markdown]
# ## Is it all true?

# %%
assert [len(steps) for steps in three.values()] == [12, 8, 6]
assert next(s.number for s in continuous if "c" in s.scheduled) == 4
for steps, tokens, _ in seven.values():
    for name, (_, prompt_len, output_len) in REQUESTS.items():
        request = make_request(name, prompt_len, output_len)
        assert tokens[name] == expected_tokens(request, TOKEN_BUDGET), "tokens depend on the schedule"
assert counts[0] == sum(output for _, _, output in REQUESTS.values()) and counts[2] <= counts[1] <= counts[0]
assert all(len(step) <= SEATS for step in seven[f"continuous, {SEATS} seats"][0])
assert tight_steps[5].preempted == ["c"] and tight_steps[6].scheduled == {"c": 13} and preempts(fewest - 1)
assert preemptions > 0 and greedy_tokens == alone
assert all(c <= s for c, s in zip(continuous_steps, static_steps)) and continuous_steps[-1] < continuous_steps[0]
profile = json.loads((ROOT / "milestones/m4/results/profile_step.json").read_text(encoding="utf-8"))["results"]
plain = {row["requests"]: row["step"] for row in profile if row["arm"] == "1 plain torch"}
assert round(plain[32] / plain[1], 1) == 4.7
print("all true:", ", ".join(f"{name}: {len(steps)} steps" for name, steps in three.items()))
