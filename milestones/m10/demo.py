"""Milestone M10 without weights: a router that remembers, a prompt that everybody sends, and a replica that dies.

Router, schedulers and caches are the real ones; times are those of the simulator. Run: python milestones/m10/demo.py"""

from folovllm.engine.router import PrefixRouter, ReplicaLoad
from folovllm.engine.sent_requests import SentRequests
from folovllm.executor.fake import fake_tokens
from folovllm.outputs import EngineCoreOutput
from folovllm.request import Request
from folovllm.sampling_params import SamplingParams
from folovllm.sim.simulate import simulate
from folovllm.sim.workloads import Recipe, follow_recipe


def make(name: str, prompt: list[int]) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=6))


def conversations_come_back() -> None:
    recipe = Recipe("tasks of four turns", 20.0, (10, 40), (5, 10), turns=4, system_prompt=64, services=6)
    load = follow_recipe(recipe, "tasks", num_requests=48)
    args = {"model": "tiny", "data_parallel_size": 4, "max_num_seqs": 16}
    hits = {router: simulate(load, router=router, **args)["prefix_hit_share"] for router in ("prefix", "random")}
    print("four engines: ", ", ".join(f"{name} router finds {share:.0%}" for name, share in hits.items()), "in a cache")
    assert hits["prefix"] > hits["random"] + 0.1


def a_popular_prompt_spreads() -> None:
    router, counts = PrefixRouter(num_replicas=3, block_size=4, num_blocks=64), [0, 0, 0]
    for i in range(12):
        request = make(f"r{i}", list(range(16)))
        replica = router.route(request, [ReplicaLoad(number, count) for number, count in enumerate(counts)])
        router.started(request, replica)
        counts[replica] += 1
    print(f"one prompt:    12 unfinished requests with it are in the replicas as {counts}")
    assert max(counts) - min(counts) <= router.max_lead + 1, "nobody waits where others idle"


def a_replica_dies() -> None:
    requests, prompt = SentRequests(num_replicas=2), [1, 2, 3]
    text = fake_tokens(prompt, 6)  # what a replica generates for this prompt
    requests.assign(requests.add(make("a", prompt)), 0)
    requests.receive([EngineCoreOutput("a", [token]) for token in text[:4]])
    assert requests.lose(0) == [], "it waits, and has not ended"
    (entry,) = requests.waiting()
    again = entry.continuation()
    rest = fake_tokens([*again.prompt_token_ids, *again.output_token_ids], 6 - again.num_output_tokens)
    print(f"a death:       {again.num_output_tokens} tokens had come, {len(rest)} more come from another replica")
    assert again.output_token_ids + rest == text, "the reader cannot tell"


for scene in (conversations_come_back, a_popular_prompt_spreads, a_replica_dies):
    scene()
