# %% [markdown]
# # 03 · Who computes when: the scheduler as a picture
#
# In every step the scheduler decides which requests take part and how many tokens each of them computes. Here the **real
# scheduler** decides it three times for the same requests: one at a time, as a static batch, and continuously. The model
# is replaced by recorded or computed tokens, so a whole schedule takes milliseconds, and a wrong one gives wrong tokens.
#
# Why share steps at all? In the engine as of M4 without its C++ kernels (the arm "plain torch"), a measured step of 32 requests takes
# 4.7 times as long as a step of one request and makes 32 times as many tokens (`milestones/m4/results/profile_step.json`).
# Sharing is not free, but it is cheap.
#
# *25 minutes. Read [learn/02](../docs/learn/02_continuous_batching.md) first. **Predict** asks before an experiment, and **Answer**
# follows it; `viz.ask("03.1", guess=8)` has your guess judged. Next: [04](04_block_tables.ipynb).*

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
from folovllm.model_shapes import shape_architecture
from folovllm.sim.cost import Calibration, CostModel
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
viz.ask("03.1", total=sum(e.max_tokens for e in EXAMPLES.values()))

# %%
viz.ask("03.2")

# %%
viz.ask("03.3")

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

# %%
longest = max(len(steps) for steps in three.values())
figure, axes = plt.subplots(3, 1, figsize=(10, 5.4), sharex=True, sharey=True)
for ax, (name, steps) in zip(axes, three.items()):
    viz.gantt(ax, entries(steps), arrivals, colours)
    ax.set_title(f"{name}: {len(steps)} steps")
axes[-1].set(xlim=(0, longest), xlabel="step (hatched: that many tokens at once; grey line: waiting)");

# %%
viz.answer("03.1", len(three["static, 2 seats"]))

# %%
continuous = three["continuous, 2 seats"]
viz.answer("03.2", next(step.number for step in continuous if "c" in step.scheduled))

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

# %%
totals = {name: sum(sum(s.scheduled.values()) for s in steps) for name, steps in three.items()}
viz.answer("03.3", [name for name in totals if totals[name] == min(totals.values())])

# %% [markdown]
# All panels have the same axes and the same coloured area. Deciding anew before every forward pass is called
# *iteration-level scheduling*; the idea is Orca's (OSDI 2022), and vLLM builds on it.
#
# ## The code that decided
#
# The code has no separate branch for prompts. A request has *known* tokens (prompt and output) and *computed* ones (their K/V
# are in the cache), and a step lets computed catch up with known. A step has a *budget*, the most tokens that it may compute
# (`max_num_batched_tokens`), and requests that run come before requests that wait. `resumed` requests were preempted before,
# and `_in_flight` counts tokens of a step that has been scheduled and not yet returned. Both come further down.

# %%
viz.source(Scheduler.schedule)

# %% [markdown]
# **Your turn.** Write the rule of `num_tokens_to_compute`: how many tokens does a step give to a request? Normally a prompt is
# computed whole or not at all. With *chunked prefill* (notebook 06) it may be cut, and a step computes as much as its budget
# allows. Run the cell; it compares your function with the engine's.

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
viz.your_turn("03.t1", my_gap, [(case, engine_gap(*case)) for case in CASES])

# %% [markdown]
# The engine's version. Its `threshold` (`long_prefill_token_threshold`) caps what one request may take of a step; notebook 06
# shows what it is good for.

# %%
viz.source(Scheduler.num_tokens_to_compute)

# %% [markdown]
# ## What you can change: seven requests, three seats
#
# Change the requests, the seats or the token budget, and run the cells below again. (If the budget is smaller than a prompt,
# the prompt is computed in chunks, as in notebook 06.)

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
viz.ask("03.4", total=sum(output for _, _, output in REQUESTS.values()), SEATS=SEATS)

# %%
viz.ask("03.5")

# %%
def run(requests=REQUESTS, **engine_args):
    """Runs the requests to their ends: the entries of every step, each request's tokens, and the core."""
    longest = max(prompt + output for _, prompt, output in requests.values())
    args = {"max_num_batched_tokens": TOKEN_BUDGET, "block_size": 4} | engine_args
    must_cut = args["max_num_batched_tokens"] < longest  # a prompt, or prompt and output after a preemption
    core = make_core(max_model_len=longest, enable_chunked_prefill=must_cut, **args)
    made = {name: make_request(name, prompt, output) for name, (_, prompt, output) in requests.items()}
    steps = []
    for _ in steps_of(core, [(requests[name][0], request) for name, request in made.items()]):
        scheduled = schedule_and_run(core).num_scheduled_tokens
        steps.append([{"req": r, "n": n, "start": made[r].num_computed_tokens - n} for r, n in scheduled.items()])
    return steps, {name: request.output_token_ids for name, request in made.items()}, core


seven = {
    "one at a time": run(batching="static", max_num_seqs=1),
    f"static, {SEATS} seats": run(batching="static", max_num_seqs=SEATS),
    f"continuous, {SEATS} seats": run(batching="continuous", max_num_seqs=SEATS),
}
counts = [len(steps) for steps, _, _ in seven.values()]

# %%
seven_arrivals, seven_colours = {name: r[0] for name, r in REQUESTS.items()}, viz.colours_of(REQUESTS)
figure, axes = plt.subplots(3, 1, figsize=(10, 8), sharex=True, sharey=True)
for ax, (name, (steps, _, _)) in zip(axes, seven.items()):
    viz.gantt(ax, steps, seven_arrivals, seven_colours)
    busy = sum(len(step) for step in steps) / (len(steps) * max(len(step) for step in steps))
    ax.set_title(f"{name}: {len(steps)} steps, {busy:.0%} of the seats in use")
axes[-1].set(xlim=(0, max(counts)), xlabel="step (hatched: that many tokens at once; grey line: waiting)");

# %%
viz.answer("03.4", counts[1])

# %%
viz.answer("03.5", counts[2])

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
viz.your_turn("03.t2", my_static_steps, [(crowd, engine_static_steps(*crowd)) for crowd in crowds])

# %% [markdown]
# ## When memory runs out
#
# With small blocks a request is admitted if its *present* length fits. The three requests again, with blocks of 4 tokens and
# only 6 of them. c needs 3 blocks for its prompt. It is admitted only in step 4, because until then a and b hold 4 of the 6.
# In step 5, b and c both need one more block, and one is free. The scheduler asks for b first.

# %%
viz.ask("03.6")

# %%
viz.ask("03.7")

# %%
tight = example_core(block_size=4, num_kv_blocks=7)  # block 0 is the null block
tight_steps = list(run_example(tight))

# %%
figure, ax = plt.subplots(figsize=(10, 2.2))
viz.gantt(ax, entries(tight_steps), arrivals, colours)
ax.set(
    xlabel="step (grey line: waiting)",
    title="6 usable blocks of 4 tokens: c is admitted in step 4, preempted in step 5, resumed in step 6",
)
for step in tight_steps[4:]:
    print(step)

# %%
viz.answer("03.6", tight_steps[5].preempted)

# %%
viz.answer("03.7", tight_steps[6].scheduled["c"])

# %%
viz.source(Scheduler.allocate_or_preempt)

# %% [markdown]
# **Your turn.** How many blocks of 4 tokens does the cache need so that the three requests run *without* a preemption? Find the
# smallest `num_kv_blocks` (the null block counts). Two ways: try `example_core` and `run_example` as above, or add up the blocks
# that the three hold in the fullest step.

# %%
my_num_kv_blocks = None  # your answer

# %%
roomy = list(run_example(example_core(block_size=4, num_kv_blocks=40)))
fewest = 1 + max(sum(map(len, step.blocks.values())) for step in roomy)
viz.your_turn("03.t3", my_num_kv_blocks, fewest)

# %% [markdown]
# ## More requests than memory
#
# Four requests that each want 20 tokens, and a cache in which at most two of them can finish side by side.

# %%
viz.ask("03.8")

# %%
GREEDY_ONES = {name: (0, 6, 20) for name in "abcd"}
BLOCKS = 18  # one is the null block; a request computes 6 + 20 - 1 = 25 tokens and ends with 7 blocks, and 17 // 7 = 2

greedy_steps, greedy_tokens, greedy_core = run(GREEDY_ONES, num_kv_blocks=BLOCKS, max_num_seqs=4)
preemptions = greedy_core.stats().num_preemptions
alone = {name: expected_tokens(make_request(name, 6, 20), max_model_len=26) for name in GREEDY_ONES}

# %%
figure, ax = plt.subplots(figsize=(10, 2.6))
viz.gantt(ax, greedy_steps, {name: 0 for name in GREEDY_ONES}, viz.colours_of(GREEDY_ONES))
ax.set(
    xlabel="step (a second hatched cell: the request is back, and computes prompt and output again)",
    title=f"{BLOCKS - 1} usable blocks of 4 tokens: {preemptions} preemptions",
);

# %%
viz.answer("03.8", greedy_tokens != alone)

# %% [markdown]
# ## More seats: when does it stop helping?
#
# 32 requests arrive together. More seats mean fewer steps, but a step with more tokens takes longer. `CostModel` says how long
# on the reference machine: until all bytes have arrived, or until the arithmetic is done, whichever is later. It leaves out
# everything else, so real steps are longer (1.4 to 7 times, see the page).

# %% tags=["given"]
model = CostModel(shape_architecture("smollm2-135m"), HARDWARE["cpu"], Calibration(1.0, 0.0, "peak rates, no overhead"))
one_decode = model.step([(16, 1)], 1)
reading_ms, computing_ms = 1000 * one_decode.memory, 1000 * one_decode.compute
print(f"a step reads the weights in {reading_ms:.1f} ms, and computes {computing_ms:.1f} ms for each request that decodes")

# %%
viz.ask("03.9", more=32, fewer=16)

# %%
seat_counts = [1, 2, 4, 8, 16, 32]
crowd_size = 16 if FAST else 32
rng = random.Random(0)
crowd = {f"r{i}": (0, rng.randint(2, 20), rng.randint(2, 30)) for i in range(crowd_size)}


def model_ms(step):
    """The modelled time of a step. No prompt is cut here, so each request of the step samples a token."""
    return 1000 * model.step([(entry["start"], entry["n"]) for entry in step], len(step)).seconds


def crowd_runs(batching):
    """Steps, and modelled seconds, for every number of seats."""
    args = {"batching": batching, "max_num_batched_tokens": 1024}  # the seats are the only limit
    all_steps = [run(crowd, max_num_seqs=seats, **args)[0] for seats in seat_counts]
    return [len(steps) for steps in all_steps], [sum(map(model_ms, steps)) / 1000 for steps in all_steps]


static_steps, static_seconds = crowd_runs("static")
continuous_steps, continuous_seconds = crowd_runs("continuous")
gain = continuous_seconds[4] / continuous_seconds[5]  # from 16 to 32 seats
knee = next(n for n in range(1, 100) if model.step([(16, 1)] * n, n).bound == "compute")

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
        ["continuous, modelled seconds", *(f"{seconds:.2f}" for seconds in continuous_seconds)],
    ],
)

# %%
viz.answer("03.9", gain, knee=knee)

# %% [markdown]
# ## Is it all true?

# %%
if viz.as_delivered("03", globals()):
    assert [len(steps) for steps in three.values()] == [12, 8, 6]
    assert next(s.number for s in continuous if "c" in s.scheduled) == 4
    for steps, tokens, _ in seven.values():
        for name, (_, prompt_len, output_len) in REQUESTS.items():
            request = make_request(name, prompt_len, output_len)
            assert tokens[name] == expected_tokens(request, max_model_len=64), "tokens depend on the schedule"
    assert counts[0] == sum(output for _, _, output in REQUESTS.values()) and counts[2] <= counts[1] <= counts[0]
    assert all(len(step) <= SEATS for step in seven[f"continuous, {SEATS} seats"][0])
    assert tight_steps[5].preempted == ["c"] and tight_steps[6].scheduled == {"c": 13}
    for blocks, enough in ((fewest, True), (fewest - 1, False)):
        tried = run_example(example_core(block_size=4, num_kv_blocks=blocks))
        assert enough != any(step.preempted for step in tried)
    assert preemptions > 0 and greedy_tokens == alone
    assert all(c <= s for c, s in zip(continuous_steps, static_steps)) and continuous_steps[-1] < continuous_steps[0]
    profile = json.loads((ROOT / "milestones/m4/results/profile_step.json").read_text(encoding="utf-8"))["results"]
    plain = {row["requests"]: row["step"] for row in profile if row["arm"] == "1 plain torch"}
    assert round(plain[32] / plain[1], 1) == 4.7
    print("all true:", ", ".join(f"{name}: {len(steps)} steps" for name, steps in three.items()))
