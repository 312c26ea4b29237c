# %% [markdown]
# # 09 · Take it apart, and put yours in: ablation and capstone
#
# Seven rungs lie behind you, from one request at a time (M1) to 4-bit weights (M7). What did each of them buy? The engine still has a
# switch for every one, so you can take the whole thing apart: climb the ladder and count, turn single rungs off, and find a rung that is
# missing from its effects alone. At the end you put a part of your own into the engine and measure it.
#
# Everything is counted by the **real scheduler and KV cache**. Times are modelled on the reference machine ([the simulator](../docs/learn/simulator.md)),
# or measured and read from result files.
#
# *40 minutes. Read [Start here](../docs/learn/00_start_here.md) and any of the learning pages 02 to 07 first. **Predict** asks before an experiment, and
# **Answer** follows it; `viz.ask("09.1", guess="m2")` has your guess judged. Next: [10](10_server_under_load.ipynb), a server under load.*

# %% tags=["parameters"]
FAST = False  # True: fewer repetitions (the builder sets it when it only checks)

# %%
import itertools
import json
import random
import sys
import tempfile
import types
import warnings
from pathlib import Path

ROOT = next(p for p in [Path.cwd(), *Path.cwd().parents] if (p / "folovllm").is_dir())
sys.path.insert(0, str(ROOT))

warnings.filterwarnings("ignore", message="IProgress")  # tqdm asks for ipywidgets, which nothing here needs

import torch
from matplotlib import pyplot as plt

from folovllm import LLM, SamplingParams, milestones, viz
from folovllm.benchmarks.workloads import make_workload
from folovllm.config import CacheConfig, SchedulerConfig
from folovllm.core.sched.request_queue import FCFSRequestQueue
from folovllm.hub.tiny_model import write_tiny_model
from folovllm.learn.exercise import find_exercises
from folovllm.learn.mine import my_engine_args, my_parts, passed_exercises
from folovllm.learn.record import read_record
from folovllm.learn.three_requests import EXAMPLES, LESSONS, example_core, run_example
from folovllm.learn.toy_engine import drive, make_core, make_request
from folovllm.parts import load_part
from folovllm.sim.counting import CountingExecutor, counters_of
from folovllm.sim.metrics import SLO
from folovllm.sim.simulate import make_simulation
from folovllm.sim.workloads import Recipe, SimRequest, SimWorkload, follow_recipe

torch.set_num_threads(1)
viz.style()
RUNGS = [rung.id for rung in milestones.engine_rungs()]
RUNG_COLOURS = dict(zip(RUNGS[1:], viz.PALETTE))

# %% [markdown]
# ## The ladder as data
#
# A rung is a set of engine arguments. `fold` puts them together, and `without` leaves rungs out. `LLM(model, preset="m5", without=["m3"])` is the engine
# as of M5 without the paged cache.

# %%
viz.source(milestones.fold)

# %%
viz.table(
    ["rung", "title", "it adds", "switched on by"],
    [
        [r.id, r.title, r.adds, next(f"{k}={v!r}" for k, v in r.on.items() if r.id != "m2" or k == "batching")]
        for r in milestones.engine_rungs()
    ],
)

# %% [markdown]
# ## Three requests up the ladder
#
# The three requests of the learning pages, at every rung. All rungs have about the same memory: two blocks of 16 tokens (M1 and M2), or nine blocks of 4. M5 may
# compute 6 tokens in a step.

# %%
viz.ask("09.1", total=sum(e.max_tokens for e in EXAMPLES.values()))

# %%
viz.ask("09.2")

# %%
def three_requests(rung):
    """Every step of the three requests in the engine as of `rung`."""
    known = CacheConfig.__dataclass_fields__ | SchedulerConfig.__dataclass_fields__
    args = {name: value for name, value in milestones.fold(rung).items() if name in known}
    if args["block_size"] == "max_model_len":
        args |= {"num_kv_blocks": 3, "max_num_seqs": args["max_num_seqs"] or 2}
    else:
        args |= {"block_size": 4, "num_kv_blocks": 10}
    if args["enable_chunked_prefill"]:
        args["max_num_batched_tokens"] = 6
    core = example_core(**args)
    return list(run_example(core)), core.kv_cache_config.block_size


def count(steps, block_size):
    """Counters of a run. A block that two requests share is counted once."""
    held = [{block for table in step.blocks.values() for block in table} for step in steps]
    return {
        "steps": len(steps),
        "most tokens in a step": max(sum(step.scheduled.values()) for step in steps),
        "tokens computed": sum(sum(step.scheduled.values()) for step in steps),
        "cached tokens": sum(step.hits.get(name, 0) for step in steps for name in step.hits if step.start[name] == step.hits[name]),
        "most slots reserved": block_size * max(map(len, held)),
    }


three = {rung: three_requests(rung) for rung in RUNGS}
counts = {rung: count(*run) for rung, run in three.items()}

# %%
NAMES = list(counts["m1"])
figure, axes = plt.subplots(1, len(NAMES), figsize=(10, 2.6))
for ax, name in zip(axes, NAMES):
    values = [counts[rung][name] for rung in RUNGS]
    changed = [i > 0 and values[i] != values[i - 1] for i in range(len(values))]
    bars = ax.bar(RUNGS, values, color=[viz.PALETTE[5] if c else "#BBBBBB" for c in changed], width=0.8)
    ax.bar_label(bars, [v if i == 0 or changed[i] else "" for i, v in enumerate(values)], size=8)
    ax.step([-0.5, *[i + 0.5 for i in range(len(values))]], [values[0], *values], where="pre", color=viz.INK, lw=0.8)
    ax.set_title(name, size=9)
    ax.tick_params(axis="x", labelsize=7)
    ax.set_ylim(0, max(values) * 1.2)
figure.suptitle("three requests: orange bars differ from the rung before", x=0.01, ha="left", size=10);

# %%
def rung_before(rung):
    return RUNGS[RUNGS.index(rung) - 1]


viz.answer("09.1", max(RUNGS[1:], key=lambda rung: counts[rung_before(rung)]["steps"] - counts[rung]["steps"]))

# %%
tokens_computed = {rung: counts[rung]["tokens computed"] for rung in RUNGS}
viz.answer("09.2", [rung for rung in RUNGS[1:] if tokens_computed[rung] != tokens_computed[rung_before(rung)]])

# %% [markdown]
# m2 halves the steps. m3 admits c two steps earlier in the same 32 slots, so one step has 14 tokens. m5 makes no step larger than its budget, and pays with a step. m6 finds the 4 tokens of
# a's first block. m4 and m7 change nothing here, because they change how long a step takes and not what it does.
#
# ## Workload A, counted, modelled and measured
#
# Workload A is 32 requests with 32 to 256 prompt tokens and 32 to 128 output tokens. It has been measured with the real model on the reference machine. The
# simulator runs the same requests with the same memory through the same scheduler, and a step takes as long as the roofline of the machine says.

# %%
viz.ask("09.3", options=RUNGS[1:])

# %%
viz.ask("09.4", options=RUNGS[1:-1])

# %%
def is_on(rung, preset, without):
    return RUNGS.index(rung) <= RUNGS.index(preset) and rung not in without


def simulate(workload, preset="m7", without=(), **args):
    """Counters and modelled times of a workload on the reference machine, with SmolLM2-135M's shape."""
    args = {"max_model_len": 2048, "kv_cache_memory": 2**30} | args
    if not is_on("m5", preset, without):
        args.pop("max_num_batched_tokens", None)  # without chunks a step must have room for any prompt
    bits = 4 if is_on("m7", preset, without) else 16
    simulation = make_simulation(
        workload, "smollm2-135m", "cpu", weight_bits=bits, preset=preset, without=without,
        executor_class=CountingExecutor, **args,
    )  # fmt: skip
    figures = simulation.run(SLO())
    tile = (128, 256) if is_on("m4", preset, without) else None  # query rows and keys of a tile of scores
    counters = counters_of(simulation, figures, tile)
    gaps = [gap for served in simulation.served.values() for gap in served.gaps]
    return counters | {
        "seconds": figures["seconds"], "tok_per_s": figures["output_tok_per_s"], "ttft_p50": figures["ttft_ms"]["p50"],
        "ttft_all": [1000 * served.ttft for served in simulation.served.values()], "longest_gap": 1000 * max(gaps),
    }  # fmt: skip


def as_sim(requests):
    return SimWorkload("A", [SimRequest(0.0, r.prompt_token_ids, r.output_len) for r in requests])


workload_a = make_workload("A", 49152)
MODES = {"one by one": ("single", 1), "together": ("batch", None)}
modelled = {
    mode: {rung: simulate(as_sim(workload_a.for_mode(key)), rung, **({"max_num_seqs": seats} if seats else {})) for rung in RUNGS}
    for mode, (key, seats) in MODES.items()
}
ladder_file = json.loads((ROOT / "milestones/m4/results/compare_perf_A_cpu.json").read_text(encoding="utf-8"))
gptq_file = json.loads((ROOT / "milestones/m7/results/compare_peers_q4_1_cpu.json").read_text(encoding="utf-8"))
measured = {
    mode: {rung: ladder_file["arms"][rung]["modes"][key]["output_tok_per_s"] for rung in RUNGS[:-1]}
    | {"m7": gptq_file["arms"]["folovllm"]["modes"][key]["output_tok_per_s"]["median"]}  # another run, another hour
    for mode, (key, _) in MODES.items()
}
steps_measured = {rung: int(ladder_file["arms"][rung]["modes"]["batch"]["num_steps"]) for rung in RUNGS[:-1]}

# %%
figure, axes = plt.subplots(2, 2, figsize=(10, 5), sharex=True, sharey="row")
for row, mode in zip(axes, MODES):
    for ax, (how, values) in zip(row, {
        "modelled": {r: m["tok_per_s"] for r, m in modelled[mode].items()}, "measured": measured[mode],
    }.items()):
        levels = [values[rung] for rung in RUNGS]
        for i, level in enumerate(levels):
            before = levels[i - 1] if i else 0
            colour = "#BBBBBB" if i == 0 else viz.PALETTE[2] if level > before else viz.PALETTE[5]
            ax.bar(i, level - before, bottom=before, color=colour, width=0.8)
            ax.hlines(level, i - 0.4, min(i + 1.4, len(levels) - 0.6), color=viz.INK, lw=0.8)
            ax.text(i, max(level, before) * 1.02 + 2, f"{level:.0f}", ha="center", va="bottom", size=8)
        ax.set_title(f"{mode}, {how}")
        ax.set_xticks(range(len(RUNGS)), RUNGS)
        ax.set_ylim(0, max(max(measured[mode].values()), max(m["tok_per_s"] for m in modelled[mode].values())) * 1.15)
for ax in axes[:, 0]:
    ax.set_ylabel("output tokens per second")

# %%
def multiplies(rung, mode):
    return measured[mode][rung] / measured[mode][rung_before(rung)]


viz.answer("09.3", max(RUNGS[1:], key=lambda rung: multiplies(rung, "together")))

# %%
viz.answer("09.4", max(RUNGS[1:-1], key=lambda rung: multiplies(rung, "one by one")))

# %% [markdown]
# Each bar begins where the rung before ended; green is gained, orange is lost. m5 and m6 gain nothing here, because the prompts of workload A are short and share no
# prefix. The measured m7 is from another run (`milestones/m7/results/compare_peers_q4_1_cpu.json`), so its distance to m6 contains the noise between two hours.

# %%
viz.table(
    ["together", *RUNGS],
    [
        ["steps, simulated", *(modelled["together"][r]["steps"] for r in RUNGS)],
        ["steps, measured run", *(steps_measured.get(r, "") for r in RUNGS)],
        ["most tokens in a step", *(modelled["together"][r]["peak_tokens"] for r in RUNGS)],
        ["tokens computed", *(modelled["together"][r]["computed_tokens"] for r in RUNGS)],
        ["running at once", *(modelled["together"][r]["peak_running"] for r in RUNGS)],
        ["reserved slots in use, %", *(round(100 * modelled["together"][r]["kv_util"]) for r in RUNGS)],
        ["cached tokens", *(modelled["together"][r]["hit_tokens"] for r in RUNGS)],
        ["tokens per second, modelled", *(round(modelled["together"][r]["tok_per_s"]) for r in RUNGS)],
        ["measured", *(round(measured["together"][r]) for r in RUNGS)],
        ["modelled / measured", *(f"{modelled['together'][r]['tok_per_s'] / measured['together'][r]:.2f}" for r in RUNGS)],
    ],
)

# %% [markdown]
# The number of steps is the same in the simulator and in the measured run, because the scheduler is the same. The times are not. For m2 and m3 the model is almost twice too
# fast: it knows nothing of the Python loop in the textbook attention. For m4 to m6 it is within 10 %. For m7 it is too hopeful, by 20 % together and by almost 60 % one by one: it counts 4 bits for every weight and no time for unpacking them,
# while the real checkpoint keeps its embeddings in 16 bits and unpacks in every step. At 32 requests a step computes longer than it reads, so 4-bit weights save little in any case (see notebook 08).
#
# ## One switch at a time
#
# A rung that gains nothing on one workload may decide another one. So take the full engine (m7 with at most 256 tokens in a step) and turn single rungs off, on three workloads:
#
# - **A**: the 32 requests above, all at once.
# - **documents**: short prompts decode, and one user in six brings a document of 1,200 to 1,800 tokens.
# - **shared**: questions behind one of three system prompts of 400 tokens.
#
# ### What you can change

# %%
NUM = 12 if FAST else 24  # requests of the workloads "documents" and "shared"
BUDGET = 256  # the most tokens in a step

# %%
viz.ask("09.5", options=RUNGS[1:])

# %%
viz.ask("09.6")

# %%
WORKLOADS = {
    "A": as_sim(workload_a.requests),
    "documents": follow_recipe(Recipe("documents", 5.0, (30, 120), (20, 80), document=(1200, 1800)), "documents", NUM),
    "shared": follow_recipe(Recipe("shared", 6.0, (20, 80), (20, 60), system_prompt=400), "shared", NUM),
}
full = {name: simulate(w, max_num_batched_tokens=BUDGET) for name, w in WORKLOADS.items()}
off = {
    name: {rung: simulate(w, without=[rung], max_num_batched_tokens=BUDGET) for rung in RUNGS[1:]}
    for name, w in WORKLOADS.items()
}


def largest_effect(workload, metric):
    """The rung whose absence changes the metric most for the worse."""
    return max(RUNGS[1:], key=lambda rung: off[workload][rung][metric] / full[workload][metric])

# %%
METRICS = {"seconds": "total time", "ttft_p50": "median TTFT", "longest_gap": "longest gap between tokens"}
figure, axes = plt.subplots(len(WORKLOADS), len(METRICS), figsize=(10, 5.6), sharex=True, sharey=True)
for row, name in zip(axes, WORKLOADS):
    for ax, (metric, title) in zip(row, METRICS.items()):
        ratios = [off[name][rung][metric] / full[name][metric] for rung in RUNGS[1:]]
        places = range(len(ratios))
        ax.barh(places, [r - 1 for r in ratios], left=1, color=list(RUNG_COLOURS.values()), height=0.75)
        for place, ratio in zip(places, ratios):
            ax.text(max(ratio, 1) * 1.06, place, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", va="center", size=8)
        ax.axvline(1, color=viz.INK, lw=0.8)
        ax.set_xscale("log")
        ax.set_title(f"{name}: {title}")
axes[0, 0].set(xlim=(0.2, 200), ylim=(len(RUNGS) - 1.4, -0.6))
axes[0, 0].set_yticks(range(len(RUNGS) - 1), [f"without {rung}" for rung in RUNGS[1:]])
axes[0, 0].set_xticks([0.2, 1, 10, 100], ["0.2", "1", "10", "100"])
for ax in axes[-1]:
    ax.set_xlabel("times the full engine (modelled)")

# %%
viz.answer("09.5", largest_effect("documents", "longest_gap"))

# %%
computed = {rung: off["shared"][rung]["computed_tokens"] for rung in RUNGS[1:]}
most = [rung for rung in computed if computed[rung] == max(computed.values())]
viz.answer("09.6", most, most=max(computed.values()), full=full["shared"]["computed_tokens"])

# %% [markdown]
# A bar to the right says that the engine is worse without the rung. Each workload has rungs of its own that matter. A bar to the left is a price: without m2, in a static batch, no prompt of a
# new request delays the tokens of the others, because the new request waits (look at its TTFT).
#
# The counters say more clearly what a rung does. This is the workload "shared". Fewer steps are not better in themselves: requests arrive at fixed times, so slow steps (without m4, or without the hits of m6) are shared by more
# requests.

# %%
COUNTED = {
    "steps": "steps", "peak_tokens": "most tokens\nin a step", "computed_tokens": "tokens\ncomputed", "kv_util": "reserved slots\nin use",
    "score_entries": "largest score\nmatrix", "weight_bytes": "bytes of\nweights",
}  # fmt: skip
figure, axes = plt.subplots(1, len(COUNTED), figsize=(10, 2.6), sharey=True)
for ax, (key, title) in zip(axes, COUNTED.items()):
    ratios = [off["shared"][rung][key] / full["shared"][key] for rung in RUNGS[1:]]
    ax.barh(range(len(ratios)), ratios, color=list(RUNG_COLOURS.values()), height=0.75)
    ax.axvline(1, color=viz.INK, lw=0.8)
    for place, ratio in enumerate(ratios):
        if round(ratio, 2) != 1:
            ax.text(ratio + 0.03 * max(ratios), place, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", va="center", size=8)
    ax.set(xlim=(0, 1.35 * max(ratios)), title=title)
axes[0].set_yticks(range(len(RUNGS) - 1), [f"without {rung}" for rung in RUNGS[1:]])
axes[0].set_ylim(len(RUNGS) - 1.4, -0.6)
figure.supxlabel("times the full engine", size=9);

# %% [markdown]
# ## Which rung is missing?
#
# **Your turn.** Three engines ran the workload "shared". Each is the full engine without one rung. Which rung, in each case? The first row is the full engine.

# %%
suspects = dict(zip("XYZ", random.Random(3).sample(RUNGS[1:], 3)))
SHOWN = ("steps", "peak_tokens", "computed_tokens", "hit_tokens", "kv_util", "score_entries", "weight_bytes")
viz.table(
    ["engine", *SHOWN],
    [["full", *(full["shared"][k] for k in SHOWN)]]
    + [[name, *(off["shared"][rung][k] for k in SHOWN)] for name, rung in suspects.items()],
)

# %%
my_suspects = None  # a dict: from each of "X", "Y" and "Z" to a rung such as "m2"

# %%
viz.your_turn("09.t1", my_suspects, suspects)

# %% [markdown]
# ## Three rungs
#
# **Your turn.** You may have m1 and three more rungs. 24 requests behind shared system prompts wait in a file, all at once, and you want the highest
# throughput on the reference machine. Which three do you take? (Think of what each of them needs from the others.)

# %%
my_three = None  # e.g. ["m2", "m5", "m7"]

# %%
file_of_prompts = follow_recipe(Recipe("file", 0.0, (20, 80), (20, 60), system_prompt=400), "shared", NUM)
throughput = {}
for three_rungs in itertools.combinations(RUNGS[1:], 3):
    left_out = [rung for rung in RUNGS[1:] if rung not in three_rungs]
    throughput[three_rungs] = simulate(file_of_prompts, without=left_out, max_num_batched_tokens=BUDGET)["tok_per_s"]
best = max(throughput, key=throughput.get)
viz.your_turn("09.t2", my_three and sorted(my_three), list(best))

# %%
ranking = sorted(throughput, key=throughput.get, reverse=True)
viz.Shown(
    f"<details><summary>All {len(ranking)} choices</summary>"
    + viz.table(["rungs", "tokens per second, modelled"], [[" ".join(r), round(throughput[r])] for r in ranking])._repr_html_()
    + "</details>",
    f"{len(ranking)} choices, from {throughput[ranking[-1]]:.0f} to {throughput[best]:.0f} tokens per second",
)

# %% [markdown]
# ## Do the tokens stay the same?
#
# The real engine answers with a tiny model in fp32, which knows the three answers by heart. `without=` turns rungs off. (If the C++ kernels of m4 have never been used on your machine,
# they are built now, which takes minutes once. `make setup` builds them, too.)

# %%
viz.ask("09.7")

# %%
scratch = tempfile.TemporaryDirectory()
model = str(write_tiny_model(Path(scratch.name), LESSONS))
PARAMS = [SamplingParams(temperature=0.0, max_tokens=e.max_tokens, ignore_eos=True) for e in EXAMPLES.values()]


def answers(**engine_args):
    """The answers of the real engine to the three requests."""
    args = {"dtype": "float32", "device": "cpu", "max_model_len": 16, "num_kv_blocks": 24} | engine_args
    outputs = LLM(model, **args).generate([e.text for e in EXAMPLES.values()], PARAMS, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


texts = {f"preset={rung!r}": answers(preset=rung) for rung in ("m1", "m7")}
texts |= {f"without=[{rung!r}]": answers(preset="m7", without=[rung]) for rung in RUNGS[1:]}

# %%
viz.table(["engine", *EXAMPLES], [[name, *map(repr, answer)] for name, answer in texts.items()])

# %%
viz.answer("09.7", len({tuple(answer) for answer in texts.values()}))

# %% [markdown]
# ## A part of your own
#
# Every replaceable class of the engine is a **part**. The engine asks `load_part` for it, once, when it is built. That is all that it takes to run your scheduler,
# your block pool or your attention in the place of the engine's own.

# %%
viz.source(load_part)

# %%
def part_of(cls):
    """A class of this notebook, as the engine argument `parts` names it. (A class in a file is "file.py:Class".)"""
    module = sys.modules.setdefault("of_this_notebook", types.ModuleType("of_this_notebook"))
    setattr(module, cls.__name__, cls)
    return f"of_this_notebook:{cls.__name__}"


viz.source(FCFSRequestQueue)

# %% [markdown]
# **Your turn.** When many requests wait, one long prompt delays all behind it. Write a queue that serves the shortest prompt first. Only `add_request` has to change:
# `self._requests` is a deque in the order of service, and a request has `num_prompt_tokens`.

# %%
class ShortestFirst(FCFSRequestQueue):
    def add_request(self, request):
        raise NotImplementedError  # your code

# %%
def order_of_service(queue, prompt_lens):
    """In which order requests with such prompts are served, one at a time, if all of them wait from the beginning."""
    core = make_core(max_num_seqs=1, batching="static", max_model_len=64, parts={"core.request_queue.fcfs": part_of(queue)})
    for number, length in enumerate(prompt_lens):
        core.add_request(make_request(f"r{number}", length, max_tokens=2))
    return [int(name[1:]) for name in drive(core)]


CROWDS = [([9, 3, 5],), ([4, 4, 2, 8, 1, 7],), ([30, 20, 10],), ([5],)]
CROWDS = [(case, sorted(range(len(case[0])), key=lambda i: (case[0][i], i))) for case in CROWDS]
verdict = viz.your_turn("09.t3", lambda prompt_lens: order_of_service(ShortestFirst, prompt_lens), CROWDS)
verdict

# %% [markdown]
# Then measure it. The next cell runs the workload "documents" with four seats and all requests at once, with the engine's own queue and, once it passes, with yours.

# %%
crowd = follow_recipe(Recipe("documents", 0.0, (30, 120), (20, 80), document=(1200, 1800)), "documents", NUM)


def ttfts(queue):
    """Seconds to the first token of each request, sorted, with a queue of four seats."""
    parts = {"core.request_queue.fcfs": part_of(queue)}
    run = simulate(crowd, max_num_seqs=4, max_num_batched_tokens=BUDGET, parts=parts)
    return sorted(ms / 1000 for ms in run["ttft_all"])


queues = {"first come, first served": ttfts(FCFSRequestQueue)}
if viz.PASSED in repr(verdict):
    queues["yours: the shortest prompt first"] = ttfts(ShortestFirst)
_, ax = plt.subplots(figsize=(9, 2.6))
for (name, seconds), colour in zip(queues.items(), viz.PALETTE):
    ax.step(range(1, len(seconds) + 1), seconds, where="mid", color=colour, label=f"{name}: median {seconds[len(seconds) // 2]:.2f} s, worst {seconds[-1]:.2f} s")
ax.set(xlabel="requests, sorted by their time to first token", ylabel="TTFT, seconds (modelled)", ylim=(0, None))
ax.legend();

# %% [markdown]
# ## Your engine
#
# These are the exercises of this course and how far you are with them (`folovllm learn` writes the folder `work`). What has passed becomes part of *your* engine.

# %%
WORK = ROOT / "work"
record = read_record(WORK)
exercises = find_exercises()
viz.table(
    ["milestone", "exercises", "passed"],
    [
        [rung, len(of_rung), ", ".join(e.name for e in of_rung if record.state(e) in ("passed", "assisted")) or "-"]
        for rung, of_rung in ((rung, [e for e in exercises if e.milestone == rung]) for rung in milestones.RUNG_IDS)
    ],
)

# %%
passed = passed_exercises(WORK)
if passed:
    parts, needed = my_parts(WORK), my_engine_args(WORK)
    print("your parts:", *parts, sep="\n  ")
else:
    pool = next(e for e in exercises if e.id == "m3/block_pool")
    reference = f"{pool.reference_class.__module__}:{pool.reference_class.__name__}"
    parts, needed = {pool.part: reference}, {}
    print(f"no exercise has passed yet; the solution of {pool.id} takes the place of yours: {parts}")
mine = answers(preset="m6", without=["m4"], parts=parts, **needed)  # m4's kernels would take the place of your attention
print("\nthe three requests on this engine:")
for name, text in zip(EXAMPLES, mine):
    print(f"  {name}: {EXAMPLES[name].text!r} -> {text!r}")

# %% [markdown]
# `folovllm generate --mine "Once upon a time"` runs SmolLM2 on the same parts, and the last exercise, [your engine](../milestones/m7/exercises/your_engine/README.md), asks for all
# of them.
#
# ## Is it all true?
#
# The last cell checks what this notebook claims. It also solves the last task, so look at it last.

# %%
if viz.as_delivered("09", globals()):
    class SolvedQueue(FCFSRequestQueue):
        def add_request(self, request):
            longer = [i for i, other in enumerate(self._requests) if other.num_prompt_tokens > request.num_prompt_tokens]
            self._requests.insert(longer[0] if longer else len(self._requests), request)


    solved_order = [order_of_service(SolvedQueue, case[0]) for case, _ in CROWDS]
    assert solved_order == [expected for _, expected in CROWDS]
    shortest, first_come = ttfts(SolvedQueue), queues["first come, first served"]
    assert shortest[len(shortest) // 2] < first_come[len(first_come) // 2] and shortest[-1] >= 0.95 * first_come[-1]
    assert [counts[r]["steps"] for r in RUNGS[:4]] == [12, 6, 6, 6] and counts["m6"]["cached tokens"] == 4
    assert all(counts[r]["tokens computed"] + counts[r]["cached tokens"] == 30 for r in RUNGS)
    assert {r: modelled["together"][r]["steps"] for r in RUNGS[:-1]} == steps_measured
    ratios = {r: modelled["together"][r]["tok_per_s"] / measured["together"][r] for r in RUNGS}
    assert min(ratios["m2"], ratios["m3"]) > 1.75 and all(0.9 < ratios[r] <= 1.105 for r in ("m1", "m4", "m5", "m6"))
    assert 1.15 < ratios["m7"] < 1.25 and 1.5 < modelled["one by one"]["m7"]["tok_per_s"] / measured["one by one"]["m7"] < 1.6
    for name in WORKLOADS:
        assert all(off[name][rung]["tokens"] == full[name]["tokens"] for rung in RUNGS[1:]), "a rung changed the tokens"
    assert largest_effect("documents", "longest_gap") == "m5" and set(best) == {"m3", "m4", "m6"}
    assert off["shared"]["m3"]["hit_tokens"] == 0 < full["shared"]["hit_tokens"]
    assert {tuple(answer) for answer in texts.values()} == {tuple(mine)}
    print(f"all true: {len(RUNGS)} rungs, {sum(len(o) for o in off.values())} ablations, best three {' '.join(best)}")
