# %% [markdown]
# # 03 · Who computes when: the scheduler as a picture
#
# A step of a language model costs about the same for one request as for thirty: the weights travel through the processor
# either way. So the scheduler's question in every step is: who rides along? Here the **real scheduler** answers it three
# times for the same requests: one at a time, as a static batch, and continuously. The model is a fake one (each token is
# a digest of what it reads through the block table), so a schedule takes milliseconds and a wrong one gives wrong tokens.
#
# *10 minutes. To read with it: `docs/learn/02_continuous_batching.md` and `folovllm/core/sched/scheduler.py`.*

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

from folovllm import SamplingParams, viz
from folovllm.config import EngineConfig
from folovllm.engine.core import EngineCore
from folovllm.executor.fake import FakeExecutor, fake_tokens
from folovllm.hf_config import parse_hf_config
from folovllm.request import Request

viz.style()

# %% [markdown]
# ## What you can turn
#
# Each request: when it arrives (in steps), how long its prompt is, how many tokens it wants. And the machine: how many
# seats, how many tokens a step may compute, how many blocks of KV cache there are.

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
TOKEN_BUDGET = 64
BLOCK_SIZE = 4

# %%
arch = parse_hf_config(json.load(open(ROOT / "tests/data/configs/SmolLM2-135M-Instruct.json")))
colours = viz.colours_of(REQUESTS)
arrivals = {name: arrives for name, (arrives, _, _) in REQUESTS.items()}


def prompt_of(name, length):
    return [(ord(name) * 31 + 7 * i) % 1000 for i in range(length)]


def make_engine(seats=SEATS, batching="continuous", blocks=None, scheduling_policy="fcfs"):
    config = EngineConfig.from_args(
        preset="m3", batching=batching, max_num_seqs=seats, block_size=BLOCK_SIZE, num_kv_blocks=blocks,
        max_model_len=TOKEN_BUDGET, max_num_batched_tokens=TOKEN_BUDGET, scheduling_policy=scheduling_policy,
    )  # fmt: skip
    return EngineCore(config.resolve(arch, "cpu"), FakeExecutor())


def run(core, requests=REQUESTS, priority=None):
    """Drive an engine to the end. Per step: who computed how many tokens; and every request's tokens."""
    steps, tokens, waiting = [], {name: [] for name in requests}, dict(requests)
    while waiting or core.has_unfinished_requests():
        for name in [n for n, (arrives, _, _) in waiting.items() if arrives <= len(steps)]:
            _, prompt_len, output_len = waiting.pop(name)
            params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
            core.add_request(Request(name, prompt_of(name, prompt_len), params, priority=(priority or {}).get(name, 0)))
        scheduled = core.scheduler.schedule()
        steps.append([{"req": name, "n": n} for name, n in scheduled.num_scheduled_tokens.items()])
        sampled = core.executor.sample(core.executor.execute(scheduled))
        for output in core.scheduler.update_from_output(scheduled, sampled):
            tokens[output.request_id] += output.new_token_ids
        core.scheduler.check_integrity()
    return steps, tokens


runs = {
    "one at a time": run(make_engine(seats=1)),
    f"static, {SEATS} seats": run(make_engine(batching="static")),
    f"continuous, {SEATS} seats": run(make_engine()),
}
names = list(runs)
num_steps = {name: len(steps) for name, (steps, _) in runs.items()}

# %% [markdown]
# ## Before you look
#
# All outputs together are 46 tokens. The first token of a request comes out of the step that computes its prompt, so one at
# a time takes as many steps as there are tokens. A static batch takes newcomers only when everybody of the last batch is
# done, so each batch lasts as long as its longest member.

# %%
viz.predict(
    "How many steps does the static batch need with 3 seats? (a, b, c first: the longest wants 14.)",
    None, num_steps[names[1]], "Each batch is as long as its longest output, and short ones leave empty seats behind.",
)  # fmt: skip

# %%
figure, axes = plt.subplots(3, 1, figsize=(10, 8), layout="constrained")
for ax, name in zip(axes, names):
    steps, _ = runs[name]
    viz.gantt(ax, steps, arrivals, colours)
    busy = sum(len(entries) for entries in steps) / (len(steps) * max(len(entries) for entries in steps))
    ax.set_title(f"{name}: {len(steps)} steps, seats busy {busy:.0%}", loc="left")
axes[-1].set_xlabel("step (hatched: a prompt of that many tokens; grey line: waiting)");

# %% [markdown]
# ## The same work, in fewer steps
#
# Nobody computes more or less than before: each picture has the same coloured area. Continuous batching fills a seat in the
# step after it became free, that is all. In vLLM's paper's words the batch is formed anew at every *iteration*.

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), sharey=True, layout="constrained")
for ax, name in zip(axes, names):
    viz.token_bars(ax, runs[name][0], colours)
    ax.set_title(name)
    ax.set_xlabel("step")
rows = [
    [name, len(steps), sum(e["n"] for s in steps for e in s), sum(len(t) for t in tokens.values()) / len(steps)]
    for name, (steps, tokens) in runs.items()
]
viz.table(["", "steps", "tokens computed", "output tokens per step"], rows)

# %%
viz.predict(
    "Which of the three computes the fewest tokens in total?",
    ["one at a time", "static", "continuous", "all the same"],
    "all the same" if len({row[2] for row in rows}) == 1 else min(rows, key=lambda r: r[2])[0],
    "Batching does not save work per token; it saves passes over the weights.",
)

# %% [markdown]
# ## When memory runs out: preemption
#
# Four requests that each want 20 tokens, and a cache in which not all of them can finish side by side. The scheduler takes the
# blocks of the request admitted last, puts it at the *front* of the queue and computes its K/V again later, prompt and output
# in one go. In the picture that is the second hatched cell of a row.

# %%
GREEDY_ONES = {name: (0, 6, 20) for name in "abcd"}
BLOCKS = 18  # one is the null block; a finished request holds 7

tight = make_engine(seats=4, blocks=BLOCKS)
tight_steps, tight_tokens = run(tight, GREEDY_ONES)
figure, ax = plt.subplots(figsize=(10, 2.4), layout="constrained")
viz.gantt(ax, tight_steps, {name: 0 for name in GREEDY_ONES}, viz.colours_of(GREEDY_ONES))
ax.set(xlabel="step", title=f"{BLOCKS - 1} usable blocks of {BLOCK_SIZE}: {tight.stats().num_preemptions} preemptions")
viz.predict(
    "Do the preempted requests give other tokens than they would alone?", ["yes", "no"],
    "no" if all(tight_tokens[n] == fake_tokens(prompt_of(n, 6), 20) for n in GREEDY_ONES) else "yes",
    "They keep the tokens they had and compute the same K/V again. What they lose is time.",
)  # fmt: skip

# %% [markdown]
# ## More seats: when does it stop helping?

# %%
seat_counts = [1, 2, 4, 8, 16] if FAST else [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
rng = random.Random(0)
crowd = {chr(0x100 + i): (0, rng.randint(2, 20), rng.randint(2, 30)) for i in range(32)}
static = [len(run(make_engine(seats=s, batching="static"), crowd)[0]) for s in seat_counts]
continuous = [len(run(make_engine(seats=s), crowd)[0]) for s in seat_counts]
figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(seat_counts, static, "o--", color=viz.PALETTE[1], label="static")
ax.plot(seat_counts, continuous, "o-", color=viz.PALETTE[0], label="continuous")
ax.set(xscale="log", yscale="log", xlabel="seats", ylabel="steps for 32 requests", title="fewer steps with more seats")
ax.set_xticks(seat_counts, seat_counts)
ax.minorticks_off()
ax.legend();

# %% [markdown]
# ## Is it all true?

# %%
for steps, tokens in runs.values():
    for name, (_, prompt_len, output_len) in REQUESTS.items():
        assert tokens[name] == fake_tokens(prompt_of(name, prompt_len), output_len), "tokens depend on the schedule"
assert num_steps[names[0]] == sum(output for _, _, output in REQUESTS.values())
assert num_steps[names[2]] <= num_steps[names[1]] <= num_steps[names[0]]
assert all(len(entries) <= SEATS for steps, _ in runs.values() for entries in steps)
assert tight.stats().num_preemptions > 0
assert all(tight_tokens[name] == fake_tokens(prompt_of(name, 6), 20) for name in GREEDY_ONES)
assert all(c <= s for c, s in zip(continuous, static)) and continuous[-1] < continuous[0]
print("all true:", ", ".join(f"{name}: {n} steps" for name, n in num_steps.items()))
