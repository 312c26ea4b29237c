# %% [markdown]
# # 10 · A server under load: queue, batch size and inter-token latency over time
#
# A server has no list of prompts. Requests come when users like, some users read slowly, some leave. Here you look into one: first at the
# messages between its two loops, on a fake model that does the same in every run; then at its queue, its batch and its latencies while it gets
# less, as much, and more than it can serve; at the end on a **real engine in a process of its own**, measured on your machine.
#
# *45 minutes. Read [learn/08](../docs/learn/08_serving.md) first. **Predict** asks before an experiment, and **Answer** follows it;
# `viz.ask("10.1", guess=2)` has your guess judged. Next: the exercises of [M8](../milestones/m8/README.md), and `folovllm bench serve` against a
# server of your own.*

# %% tags=["parameters"]
FAST = False  # True: fewer requests (the builder sets it when it only checks)

# %%
import asyncio
import json
import logging
import math
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

from matplotlib import pyplot as plt

from folovllm import SamplingParams, start_async_llm, viz
from folovllm.benchmarks.serve.traffic import arrival_times, random_prompts
from folovllm.engine.core_loop import EngineCoreLoop
from folovllm.engine.messages import AbortRequests, AddRequests, StepOutputs, Stop
from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.learn.three_requests import EXAMPLES, example_core, example_request, text_of
from folovllm.learn.toy_engine import make_core, make_request
from folovllm.learn.toy_server import HeldExecutor, start_toy_llm
from folovllm.model_shapes import shape_architecture, shape_config
from folovllm.outputs import CompletionOutput, RequestOutput
from folovllm.sampling_params import RequestOutputKind
from folovllm.sim.cost import CostModel, calibration_of
from folovllm.sim.executor import SimExecutor
from folovllm.sim.hardware import HARDWARE
from folovllm.sim.metrics import SLO, Served
from folovllm.utils import percentile

viz.style()

# %% [markdown]
# ## Two loops, and the messages between them
#
# The event loop talks to the clients, and the engine's loop computes steps. They share nothing but messages. The engine's loop empties
# its inbox *between* two steps:

# %%
viz.source(EngineCoreLoop.run)

# %% [markdown]
# `inbox` and `send` are a pipe in a server. Here they are two lists, so that you can write the front end's part by hand. The requests are
# those of the whole course, with longer answers: a and b arrive while the loop is idle and get 8 tokens each, c arrives while step 1 is
# computed and gets 4. Blocks hold 4 tokens.

# %%
class Script:
    """An inbox that holds, for each turn of the loop, the messages that have arrived by then."""

    def __init__(self, *turns):
        self.turns = list(turns)

    def take(self, wait, timeout=None):
        if self.turns:
            return self.turns.pop(0)
        return [Stop()] if wait else []  # the loop is idle, and no message will come


def said(message):
    """A message in a few words."""
    if isinstance(message, AddRequests):
        return "add " + ", ".join(request.request_id for request in message.requests)
    return "abort " + ", ".join(message.request_ids)


def run_loop(*turns):
    """Runs the engine's own loop on a script. Returns what it has sent, and the core."""
    core, sent = example_core(num_kv_blocks=12), []
    EngineCoreLoop(core, Script(*turns), sent.append).run()
    return sent, core


def add(*names):
    """The message that brings requests, each with as many tokens to generate as are recorded: a 8, b 8, c 4."""
    return AddRequests([example_request(name, max_tokens=len(EXAMPLES[name].answer_token_ids)) for name in names])


def arrivals():
    """The messages that are there before step 0, before step 1, before step 2."""
    return [[add("a", "b")], [], [add("c")]]

# %%
viz.ask("10.1")

# %%
viz.ask("10.2")

# %%
script = [*arrivals(), [AbortRequests(["b"])]]  # b's client has left while step 2 was computed
stays, _ = run_loop(*arrivals())
leaves, core = run_loop(*script)
usable = core.kv_cache_config.num_usable_blocks


def told(output):
    """What one EngineCoreOutput says: the new token, and how the request has ended."""
    new = repr(text_of(output.new_token_ids)) if output.new_token_ids else "no token"
    return f"{output.request_id} {new}" + (f" ({output.finish_reason})" if output.finish_reason else "")


def blocks_held(message):
    return round(message.stats.kv_cache_usage * usable)


rows = [
    [number, "; ".join(map(said, script[number])) if number < len(script) else "",
     "; ".join(map(told, message.outputs)), message.stats.num_running, blocks_held(message)]
    for number, message in enumerate(leaves)
]  # fmt: skip
viz.table(["step", "messages before it", "StepOutputs after it", "running", "blocks held"], rows)

# %%
def steps_with(name, sent):
    """The numbers of the steps that gave a request a token."""
    return [n for n, message in enumerate(sent) for o in message.outputs if o.request_id == name and o.new_token_ids]


viz.answer("10.1", steps_with("c", leaves)[0])

# %%
viz.answer("10.2", len([step for step in steps_with("b", leaves) if step >= 3]))

# %%
figure, ax = plt.subplots(figsize=(8, 2.4))
for sent, label, colour in ((stays, "b reads to its end", viz.PALETTE[5]), (leaves, "b leaves", viz.PALETTE[0])):
    held = [blocks_held(message) for message in sent]
    ax.step(range(len(held) + 1), [*held, held[-1]], where="post", color=colour, label=label)
ax.axvline(3, color=viz.INK, ls=":", lw=1)
ax.text(3.08, 9.9, "the abort is taken here", va="top")
ax.set(xlabel="step", ylabel="blocks held after it", ylim=(0, 10), title="the blocks of a client that leaves")
ax.legend(loc="lower left");

# %% [markdown]
# An abort waits only for the end of the step that is being computed: b's blocks are free before the next step is scheduled. In the picture the
# two lines part in step 3. The last output of b, without a token, tells the front end that its id is out of use.
#
# ## A reader who is slower than the engine
#
# Now the whole front end, `AsyncLLM`, on a fake model in a thread. A notebook has a running event loop, so `await` works in a cell. Three
# clients read the same answer of 24 tokens: one takes each output at once, one takes what there is after every fourth step, one sleeps
# until the engine has finished. The engine makes its next step when the first client has read.

# %%
NUM_TOKENS, EVERY = 24, 4

# %%
viz.ask("10.3", NUM_TOKENS=NUM_TOKENS)

# %%
DELTA = RequestOutputKind.DELTA


def greedy(num_tokens):
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0, detokenize=False, output_kind=DELTA)


async def three_readers():
    """When each reader takes an output (the number of steps so far), and how many tokens are in it."""
    held, taken = HeldExecutor(), {"at once": [], f"every {EVERY}th step": [], "asleep": []}
    async with await start_toy_llm(held) as llm:
        fast, slow, asleep = [await llm.add_request(name, [7, 8, 9], greedy(NUM_TOKENS)) for name in taken]

        async def take(name, stream, step):
            output = await anext(stream)
            taken[name].append((step, len(output.outputs[0].token_ids)))

        for step in range(1, NUM_TOKENS + 1):
            held.allow(1)
            await take("at once", fast, step)
            if step % EVERY == 0 or step == NUM_TOKENS:
                await take(f"every {EVERY}th step", slow, step)
        while sum(size for _, size in taken["asleep"]) < NUM_TOKENS:
            await take("asleep", asleep, NUM_TOKENS)
    return taken


taken = await three_readers()

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.2), sharex=True, sharey=True)
for ax, (name, outputs), colour in zip(axes, taken.items(), viz.PALETTE):
    ax.bar([step for step, _ in outputs], [size for _, size in outputs], width=0.8, color=colour)
    ax.set(title=f"{name}: {len(outputs)} output{'s' * (len(outputs) > 1)}", xlabel="steps so far")
axes[0].set_ylabel("tokens in the output");

# %%
viz.answer("10.3", len(taken["asleep"]), total=sum(size for _, size in taken["asleep"]))

# %% [markdown]
# The collector of a request never lets the engine wait, and never holds more than one output. What its reader has not taken is merged with
# what comes next:

# %%
viz.source(RequestOutputCollector.put)

# %% [markdown]
# ### Your turn: what a reader gets
#
# Tokens arrive at the moments `arrivals`, one each. The reader comes at the moments `visits`, takes what is there, and goes away if there is
# nothing. A token that arrives at the moment of a visit is there. How many tokens are in each output that it takes?

# %%
def output_sizes(arrivals, visits):
    """Both lists are sorted. Visits that find nothing give no output."""
    return None  # your code

# %%
def sizes_of_the_collector(arrivals, visits):
    collector, sizes = RequestOutputCollector(DELTA), []
    for moment, is_visit in sorted([(t, False) for t in arrivals] + [(t, True) for t in visits]):
        if not is_visit:
            collector.put(RequestOutput("r", None, [1], [CompletionOutput(0, "", [5])], finished=False))
        elif (output := collector.get_nowait()) is not None:
            sizes.append(len(output.outputs[0].token_ids))
    return sizes


VISITS = [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4, 5], [2, 5]), ([1, 2, 3], [0, 9]), ([4, 5], [1, 2, 3]), ([1, 1, 6], [1, 3, 7])]
viz.your_turn("10.t1", output_sizes, [(case, sizes_of_the_collector(*case)) for case in VISITS])

# %% [markdown]
# ## What you can change: the machine and its users
#
# The scheduler and the KV cache stay the real ones. The time of each step is modelled on the reference machine (2 cores, 445 GFLOP/s,
# 34.6 GB/s, [the simulator](../docs/learn/simulator.md)), so each run gives the same numbers.

# %%
SEATS = 16  # max_num_seqs
PROMPT, OUTPUT = (40, 120), (20, 60)  # tokens of a request, from and to
LOADS = [0.6, 1.0, 1.5]  # offered load, as a share of what the machine can serve
PROMISE = SLO(ttft=0.5, itl=0.15)  # seconds: what the users were promised

# %%
NUM_REQUESTS = 60 if FAST else 240
BUDGET, BLOCK_SIZE = 256, 16
ARCH = shape_architecture("smollm2-135m")
COST = CostModel(ARCH, HARDWARE["cpu"], calibration_of("cpu", uses_plain_torch=False))
LONGEST = PROMPT[1] + OUTPUT[1]
NUM_BLOCKS = 1 + SEATS * math.ceil(LONGEST / BLOCK_SIZE)
REQUESTS = random_prompts(NUM_REQUESTS, 0, None, prompt_len=PROMPT, output_len=OUTPUT)

# %% [markdown]
# ## The cost of n streams
#
# All running requests share a step: the weights are read once, whether for 1 token or for 16. Suppose that n streams decode together, each
# with 100 tokens in its cache.

# %%
viz.ask("10.4")

# %%
STREAMS = [1, 2, 4, 8, 16, 32, 64]
step_ms = {n: 1000 * COST.step([(100, 1)] * n, n).seconds for n in STREAMS}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), sharex=True)
left.plot(STREAMS, list(step_ms.values()), "o-", color=viz.PALETTE[0])
left.set(title="inter-token latency, ms", xscale="log", ylim=(0, None), xlabel="streams")
right.plot(STREAMS, [1000 * n / step_ms[n] for n in STREAMS], "o-", color=viz.PALETTE[1])
right.set(title="tokens per second, all streams together", ylim=(0, None), xlabel="streams")
left.set_xticks(STREAMS, STREAMS)
left.minorticks_off();

# %%
viz.answer("10.4", step_ms[16] / step_ms[1], n1=step_ms[1], n16=step_ms[16])

# %% [markdown]
# The curve is flat as long as the step waits for the weights, and rises with n when it computes. `max_num_seqs` sets how far to the right a
# server may go, and with it the longest ITL that decodes alone can cause.
#
# ## Open loop: users do not wait for each other
#
# `serve` is a server's day in 25 lines. `due` says when each request arrives. The engine steps, and the modelled time passes; what has arrived
# meanwhile joins the queue before the next step.

# %%
@dataclass
class Run:
    served: dict = field(default_factory=dict)  # number of the request -> Served: its arrival and the times of its tokens
    panel: list = field(default_factory=list)  # after each step: (time, waiting, running, share of the KV cache held)
    refused: int = 0

    @property
    def seconds(self):
        return self.panel[-1][0]

    @property
    def tokens_per_second(self):
        return sum(len(one.token_times) for one in self.served.values()) / self.seconds

    @property
    def good_share(self):
        """The share of all requests, the refused ones included, that got what was promised."""
        return sum(one.is_good(PROMISE) for one in self.served.values()) / (len(self.served) + self.refused)

    def ttft(self, q):
        return percentile([one.ttft for one in self.served.values()], q)


def serve(due, cost=COST, max_queue=math.inf, follow=False):
    """Serves one request per entry of `due`. In a closed loop (`follow`) a request without a time, math.inf, is sent
    when an answer is complete. A request that finds `max_queue` others waiting is refused."""
    executor, run, due, num_open = SimExecutor(cost), Run(), list(due), 0
    core = make_core(
        executor, max_model_len=LONGEST, block_size=BLOCK_SIZE, num_kv_blocks=NUM_BLOCKS, max_num_seqs=SEATS,
        enable_chunked_prefill=True, max_num_batched_tokens=BUDGET,
    )  # fmt: skip
    todo = deque(range(len(due)))
    while todo or num_open:
        if not num_open:
            executor.now = max(executor.now, due[todo[0]])  # nothing to do until the next request
        while todo and due[todo[0]] <= executor.now:
            number = todo.popleft()
            if num_open >= SEATS + max_queue:
                run.refused += 1
                continue
            core.add_request(make_request(str(number), REQUESTS[number].prompt, REQUESTS[number].output_len))
            run.served[number] = Served(due[number], REQUESTS[number].prompt_len)
            num_open += 1
        for output in core.step() if num_open else ():
            run.served[int(output.request_id)].token_times += [executor.now] * len(output.new_token_ids)
            num_open -= output.finished
            if output.finished and follow and todo and max(due) == math.inf:
                due[due.index(math.inf)] = executor.now  # this client sends its next request
        stats = core.stats()
        run.panel.append((executor.now, stats.num_waiting, stats.num_running, stats.kv_cache_usage))
    return run


burst = serve([0.0] * NUM_REQUESTS)
CAPACITY = NUM_REQUESTS / burst.seconds

# %% [markdown]
# `burst` had all requests in the queue from the beginning, so the batch was always full: that is what the machine can serve, `CAPACITY`
# requests per second. Users know nothing of each other, so they arrive by a Poisson process: sometimes four in a tenth of a second, then none
# for half a second. `arrival_times` is the code of `folovllm bench serve`:

# %%
viz.source(arrival_times)

# %%
viz.ask("10.5")

# %%
viz.ask("10.6")

# %%
def offered(load, num=NUM_REQUESTS):
    """The arrivals of an open loop."""
    return arrival_times(num, load * CAPACITY, burstiness=1.0, seed=1)


runs = {load: serve(offered(load)) for load in LOADS}

# %%
CRISP = {"markeredgewidth": 0, "antialiased": False}  # thousands of dots, and yet a small file


def gaps_over_time(run):
    """(moment, gap before it) for every token but the first of each request."""
    return [(t, gap) for one in run.served.values() for t, gap in zip(one.token_times[1:], one.gaps)]


def draw_panel(axes, panel, gaps, last_arrival):
    """Queue, batch, memory and ITL of one run, below each other."""
    times, *series = zip(*panel)
    for ax, values, colour in zip(axes, series, (viz.PALETTE[5], viz.PALETTE[0], viz.PALETTE[2])):
        ax.plot(times, values, drawstyle="steps-post", color=colour, lw=1, antialiased=False)
    axes[-1].plot(*zip(*gaps), "s", ms=1.5, color=viz.PALETTE[7], **CRISP)
    for ax in axes:
        ax.axvline(last_arrival, color=viz.INK, ls=":", lw=0.8)


figure, axes = plt.subplots(4, len(LOADS), figsize=(9, 4.8), sharex="col", sharey="row", squeeze=False)
for column, (load, run) in zip(axes.T, runs.items()):
    milliseconds = [(t, 1000 * gap) for t, gap in gaps_over_time(run)]
    draw_panel(column, run.panel, milliseconds, offered(load)[-1])
    column[0].set_title(f"load {load:g}: {load * CAPACITY:.1f} requests per second")
    column[-1].set_xlabel("seconds (dotted: last arrival)")
for ax, label in zip(axes[:, 0], ("waiting", "running", "KV cache held", "ITL, ms")):
    ax.set_ylabel(label)
    ax.set_ylim(0, None)

# %%
def grows(run, column, until):
    """Whether a series of the panel still grows: its mean in the last quarter of the arrivals against the second one."""
    def mean(start, end):
        values = [entry[column] for entry in run.panel if start * until <= entry[0] < end * until]
        return sum(values) / max(len(values), 1)

    return mean(0.75, 1.0) > 1.3 * mean(0.25, 0.5)


HIGH, LOW = max(LOADS), min(LOADS)
growing = [grows(runs[HIGH], column, offered(HIGH)[-1]) for column in (1, 2, 3)]
viz.answer("10.5", growing, SEATS=SEATS)

# %%
median_itl = {load: percentile([gap for _, gap in gaps_over_time(run)], 50) for load, run in runs.items()}
first_ratio = runs[HIGH].ttft(50) / runs[LOW].ttft(50)
viz.answer("10.6", median_itl[HIGH] / median_itl[LOW], first_ratio=first_ratio, SEATS=SEATS)

# %% [markdown]
# Look at the columns from left to right. Below the capacity, the batch grows and shrinks with the arrivals, and the queue is empty most of the
# time. At the capacity, a burst of arrivals leaves a queue that lasts for seconds. Above it, all seats are taken, and **only the queue grows**, by
# the difference between the rate of the arrivals and the capacity. After the last arrival, the server still has to empty the queue.
#
# The ITL has two bands in every column. The lower one, about 10 ms, are steps with decodes alone. The dots above it are steps that also compute
# prompts, up to 256 tokens in a step (`BUDGET`). More load means more of these dots, and no higher ones.
#
# ### Your turn: how many are in the server
#
# From the arrivals and the ends of all requests, compute how many requests were in the server (waiting or running) on average over `seconds`.
# (You need no time line. This is Little's law: number = rate × time in the server.)

# %%
def mean_in_server(arrivals, ends, seconds):
    """Two lists of equal length. The server is empty before the first arrival and after `seconds`."""
    return None  # your code

# %%
def counted_in_server(arrivals, ends, seconds):
    """The same, counted along the time line."""
    events = sorted([(t, 1) for t in arrivals] + [(t, -1) for t in ends])
    inside = area = before = 0.0
    for moment, change in events:
        area += inside * (moment - before)
        inside, before = inside + change, moment
    return area / seconds


def times_in(run):
    return [one.arrival for one in run.served.values()], [one.token_times[-1] for one in run.served.values()], run.seconds


LITTLE = [([0, 1], [4, 3], 5), ([0, 0, 0], [1, 2, 3], 4), *(times_in(run) for run in runs.values())]
viz.your_turn("10.t2", mean_in_server, [(case, counted_in_server(*case)) for case in LITTLE])

# %% [markdown]
# ## The knee: latency and goodput against the rate
#
# A finer sweep of the same users. TTFT is the time from the arrival to the first token. *Goodput* counts requests that kept the promise: the
# first token within 500 ms, and no gap between tokens longer than 150 ms.

# %%
viz.ask("10.7")

# %%
viz.ask("10.8")

# %%
SWEEP = sorted({*([0.6, 1.0, 1.5] if FAST else [0.3, 0.45, 0.6, 0.75, 0.85, 0.95, 1.05, 1.2, 1.35, 1.5]), LOW, HIGH})
swept = {load: runs.get(load) or serve(offered(load)) for load in SWEEP}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), sharex=True)
rates = [load * CAPACITY for load in SWEEP]
for q, colour in zip((50, 90, 99), (viz.PALETTE[4], viz.PALETTE[0], viz.PALETTE[7])):
    left.plot(rates, [1000 * run.ttft(q) for run in swept.values()], "o-", ms=3, color=colour, label=f"p{q}")
left.axhline(1000 * PROMISE.ttft, color=viz.PALETTE[5], ls="--", lw=1)
left.text(rates[0], 1000 * PROMISE.ttft * 1.15, "promised", color=viz.PALETTE[5])
left.set(yscale="log", title="time to first token, ms", xlabel="requests per second")
left.legend()
done = {load: len(run.served) / run.seconds for load, run in swept.items()}
good = {load: run.good_share * len(run.served) / run.seconds for load, run in swept.items()}
right.plot(rates, list(done.values()), "o-", ms=3, color=viz.PALETTE[1])
right.plot(rates, list(good.values()), "s-", ms=3, color=viz.PALETTE[2])
right.text(rates[-1], done[SWEEP[-1]] * 0.97, "answered", color=viz.PALETTE[1], ha="right", va="top")
right.text(rates[-1], good[SWEEP[-1]] + 0.6, "goodput", color=viz.PALETTE[2], ha="right")
right.set(title="requests per second", xlabel="requests per second, offered", ylim=(0, None))
for ax in (left, right):
    ax.axvline(CAPACITY, color=viz.INK, ls=":", lw=1)

# %%
viz.answer("10.7", swept[HIGH].ttft(99) / swept[LOW].ttft(99), low=1000 * swept[LOW].ttft(99), high=swept[HIGH].ttft(99))

# %%
viz.answer("10.8", swept[HIGH].good_share, rate=done[HIGH], best=max(done.values()))

# %% [markdown]
# The dotted line is the capacity. The knee is *before* it: at 95 % of the capacity the bursts of a Poisson process already make queues. Above the
# capacity the server answers as many requests as it can, and nearly all of them too late, because each waits behind others that are too late.
#
# ### Your turn: refuse some
#
# `folovllm serve --max-queue N` answers 429 when N requests wait. With N too large users wait too long, with N too small the server has no
# work after a burst. Which of the `QUEUES` has the largest goodput at the highest load? `serve(offered(HIGH), max_queue=8)` returns a `Run`, and
# `run.good_share` is the share of all requests, the refused ones included, that got what was promised.

# %%
QUEUES = [0, 2, 4, 8, 16, 32, 64]

# %%
my_queue = None  # one of QUEUES, or code

# %%
good_shares = {queue: serve(offered(HIGH), max_queue=queue).good_share for queue in QUEUES}
viz.your_turn("10.t3", my_queue, max(good_shares, key=good_shares.get))

# %% [markdown]
# ## Closed loop: why some benchmarks see no queue
#
# In a closed loop, N clients send a request each, wait for its answer, and send the next one. It is how many benchmarks put load on a server.
# Now the machine becomes **half as fast** (half the FLOP/s, half the bandwidth, twice the overhead), as if a second program ran on it. One
# benchmark is a closed loop with as many clients as there are seats, the other an open loop that offers 80 % of what the machine could serve
# before. What do their reports say?

# %%
viz.ask("10.9", SEATS=SEATS)

# %%
viz.ask("10.10")

# %%
slower = replace(COST.hardware, flops=COST.hardware.flops / 2, bandwidth=COST.hardware.bandwidth / 2)
half = replace(COST, hardware=slower, calibration=replace(COST.calibration, overhead=2 * COST.calibration.overhead))
closed_due = [0.0] * SEATS + [math.inf] * (NUM_REQUESTS - SEATS)
loops = {
    "closed": [serve(closed_due, cost, follow=True) for cost in (COST, half)],
    "open": [serve(offered(0.8), cost) for cost in (COST, half)],
}

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
for ax, (name, pair) in zip(axes, loops.items()):
    for run, label, colour in zip(pair, ("full speed", "half speed"), (viz.PALETTE[0], viz.PALETTE[5])):
        ones = run.served.values()
        ax.plot([one.arrival for one in ones], [one.ttft for one in ones], "s", ms=2.6, color=colour, label=label, **CRISP)
    ax.set(title=f"{name} loop: each dot is a request", xlabel="seconds, when it was sent", yscale="log")
axes[0].set_ylabel("time to first token, s")
axes[0].legend(loc="upper right");

# %%
worse = {name: after.ttft(99) / before.ttft(99) for name, (before, after) in loops.items()}
sent_less = loops["closed"][1].seconds / loops["closed"][0].seconds
viz.answer("10.9", worse["closed"], sent_less=sent_less)

# %%
viz.answer("10.10", worse["open"], load=0.8 * loops["closed"][1].seconds / loops["closed"][0].seconds)

# %% [markdown]
# (The first dots of the closed loop are high because all clients send their first request at the same moment.)
#
# Both reports are true. The closed loop tells how fast the server is with as many requests in it as there are clients. The open loop tells what
# users feel, because users do not come more slowly when the server is slow.
#
# ## A real engine on your machine
#
# Now measured. The engine runs in a process of its own: the shape of SmolLM2-135M with random weights (speed does not depend on what weights
# say), bf16, all cores. This notebook's event loop is its front end, and sends requests at their times. An *observer* hears of each step: the
# server's `/metrics` page is made in the same way.

# %%
class Panel:
    """What the engine says after each step."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.entries, self.start = [], time.perf_counter()

    def on_added(self, request): ...

    def on_dead(self, cause): ...

    def on_step(self, stats, outputs):
        now = time.perf_counter() - self.start
        self.entries.append((now, stats.num_waiting, stats.num_running, stats.kv_cache_usage))


logging.getLogger("folovllm").setLevel(logging.ERROR)
folder = tempfile.TemporaryDirectory()
shape = "tiny" if FAST else "smollm2-135m"
Path(folder.name, "config.json").write_text(json.dumps(shape_config(shape)))
fast_args = {"without": ["m4"], "dtype": "float32"} if FAST else {"dtype": "bfloat16"}
llm = await start_async_llm(
    folder.name, load_format="dummy", skip_tokenizer_init=True, device="cpu", max_model_len=LONGEST,
    num_kv_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=SEATS, max_num_batched_tokens=BUDGET, **fast_args,
)  # fmt: skip
panel = Panel()
llm.add_observer(panel)

# %%
async def one_user(name, request, due, start):
    """Sends a request at its time, and reads the answer. Returns its times, and how long it was queued."""
    await asyncio.sleep(max(start + due - time.perf_counter(), 0.0))
    one = Served(time.perf_counter() - start, request.prompt_len)
    prompt = {"prompt_token_ids": [token % 500 for token in request.prompt]}
    async for output in llm.generate(prompt, greedy(request.output_len), name):
        now = time.perf_counter() - start
        one.token_times += [now] * len(output.outputs[0].token_ids)
    return one, output.metrics.queue_time


async def measure(requests, due):
    """A run like those above, with queue times. The panel starts anew."""
    panel.restart()
    names = [f"{time.monotonic_ns()}-{i}" for i in range(len(due))]
    users = [one_user(name, *pair, panel.start) for name, *pair in zip(names, requests, due)]
    results = await asyncio.gather(*users)
    served = {i: one for i, (one, _) in enumerate(results)}
    return Run(served, list(panel.entries)), [queued for _, queued in results]

# %%
viz.ask("10.11")

# %%
viz.ask("10.12")

# %%
viz.ask("10.13")

# %%
together = [n for n in (1, 2, 4, 8, 16) if n <= SEATS]
same = replace(REQUESTS[0], prompt=REQUESTS[0].prompt[:PROMPT[0]], prompt_len=PROMPT[0], output_len=min(20, OUTPUT[1]))
await measure([same] * SEATS, [0.0] * SEATS)  # warm up
measured_ms = dict.fromkeys(together, math.inf)
for _ in range(3):  # other programs can only make it slower: the fastest of three counts
    for n in together:
        run, _ = await measure([same] * n, [0.0] * n)
        gaps = [gap for one in run.served.values() for gap in one.gaps if gap > 0]  # 0: two tokens in one output
        measured_ms[n] = min(measured_ms[n], 1000 * (percentile(gaps, 50) or math.inf))

# %%
num_burst = 2 * SEATS
real_burst, _ = await measure(REQUESTS[:num_burst], [0.0] * num_burst)
REAL_CAPACITY = num_burst / real_burst.seconds

# %%
SECONDS = 0.5 if FAST else 5.0  # of arrivals, for each load
REAL_LOADS = [0.5, 1.0, 2.0]
real_runs, real_due, queued = {}, {}, {}
for load in REAL_LOADS:
    least = 3 * SEATS if load > 1 else 8  # on a slow machine, too, a queue must have time to grow
    count = min(max(round(load * REAL_CAPACITY * SECONDS), least), NUM_REQUESTS)
    real_due[load] = arrival_times(count, load * REAL_CAPACITY, burstiness=1.0, seed=2)
    real_runs[load], queued[load] = await measure(REQUESTS[:count], real_due[load])
stats = llm.stats
await llm.shutdown()
folder.cleanup()

# %%
figure, axes = plt.subplots(4, len(REAL_LOADS), figsize=(9, 4.8), sharex="col", sharey="row")
for column, (load, run) in zip(axes.T, real_runs.items()):
    milliseconds = [(t, 1000 * gap) for t, gap in gaps_over_time(run)]
    draw_panel(column, run.panel, milliseconds, real_due[load][-1])
    column[0].set_title(f"load {load:g}, measured: {load * REAL_CAPACITY:.1f} per second")
    column[-1].set_xlabel("seconds (dotted: last arrival)")
for ax, label in zip(axes[:, 0], ("waiting", "running", "KV cache held", "ITL, ms")):
    ax.set_ylabel(label)
    ax.set_ylim(0, None)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6))
left.plot(together, list(measured_ms.values()), "s-", color=viz.PALETTE[0], label="measured here")
left.plot(together, [step_ms[n] for n in together], "o--", color=viz.PALETTE[5], label="modelled")
left.set(title="inter-token latency, ms", xlabel="streams", ylim=(0, None), xticks=together)
left.legend()
for (load, run), colour in zip(real_runs.items(), (viz.PALETTE[4], viz.PALETTE[0], viz.PALETTE[7])):
    first = sorted(one.ttft for one in run.served.values())
    shares = [(i + 1) / len(first) for i in range(len(first))]
    right.plot(first, shares, drawstyle="steps-post", color=colour, label=f"load {load:g}")
right.set(title="share of the requests that have their first token", xscale="log", ylim=(0, 1.02),
          xlabel="seconds after the request")  # fmt: skip
right.legend(loc="lower right");

# %%
viz.table(
    ["", "modelled", "measured here"],
    [["capacity, requests per second", CAPACITY, REAL_CAPACITY],
     ["ITL of 1 stream, ms", step_ms[1], measured_ms[1]],
     [f"ITL of {together[-1]} streams, ms", step_ms[together[-1]], measured_ms[together[-1]]],
     ["TTFT p99 at the lowest load, s", runs[LOW].ttft(99), real_runs[0.5].ttft(99)],
     ["TTFT p99 at the highest load, s", runs[HIGH].ttft(99), real_runs[2.0].ttft(99)]],
)  # fmt: skip

# %%
most = together[-1]
gain = most * measured_ms[1] / measured_ms[most]
viz.answer("10.11", gain, most=most)

# %%
slowest = sorted(range(len(queued[2.0])), key=lambda i: real_runs[2.0].served[i].ttft)[len(queued[2.0]) // 2 :]
queue_share = sum(queued[2.0][i] for i in slowest) / sum(real_runs[2.0].served[i].ttft for i in slowest)
viz.answer("10.12", queue_share)

# %%
asked = sum(REQUESTS[i].output_len for run in real_runs.values() for i in run.served)
got = sum(len(one.token_times) for run in real_runs.values() for one in run.served.values())
viz.answer("10.13", asked - got, asked=asked)

# %%
if not FAST and (real_runs[2.0].ttft(99) < real_runs[0.5].ttft(99) or gain > most):
    print(f"These measurements contradict each other: {viz.MEASURE_AGAIN}")

# %% [markdown]
# With HTTP in front the panel looks the same: start `folovllm serve`, and send it `folovllm bench serve --request-rate 5 --num-prompts 60
# --ignore-eos --goodput ttft:500 --plot`. The page at http://127.0.0.1:8000 shows queue and blocks while it runs.
#
# ## Is it all true?

# %%
if viz.as_delivered("10", globals()):
    assert [message.outputs[0].finish_reason for message in leaves[3:4]] == ["abort"] and blocks_held(leaves[-1]) == 0
    assert all(isinstance(message, StepOutputs) for message in leaves)
    assert all(sum(size for _, size in outputs) == NUM_TOKENS for outputs in taken.values()), "no token is lost"
    assert {name: len(outputs) for name, outputs in taken.items()} == {"at once": 24, "every 4th step": 6, "asleep": 1}
    assert step_ms[16] < 2 * step_ms[1] and step_ms[64] > 3 * step_ms[1]
    for run in [burst, *swept.values(), *(run for pair in loops.values() for run in pair)]:
        assert len(run.served) == NUM_REQUESTS and max(running for _, _, running, _ in run.panel) <= SEATS
        assert all(len(one.token_times) == REQUESTS[i].output_len for i, one in run.served.items())
        assert run.panel[-1][1:] == (0, 0, 0.0), "empty at the end, and no block is held"
    assert grows(runs[1.5], 1, offered(1.5)[-1]) and median_itl[1.5] < 2 * median_itl[0.6]
    queue = [waiting for now, waiting, _, _ in loops["closed"][1].panel if now > 2]  # all came at once in the beginning
    assert sum(queue) / len(queue) < 0.5, "a closed loop has no queue"
    assert worse["closed"] < 3 < worse["open"]
    assert asked == got and stats.kv_cache_usage == 0.0 and stats.num_running == stats.num_waiting == 0
    count = sum(len(run.served) for run in real_runs.values())
    print(f"all true: nothing was lost in {count} requests to the real engine")
