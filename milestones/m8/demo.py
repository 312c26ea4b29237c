"""Milestone M8 without weights: frames on the wire, a client that leaves, and one that sleeps.

The front end is the real one, and the loop of the engine runs in a thread. Run: python milestones/m8/demo.py"""

import asyncio
import json
from collections.abc import AsyncIterator

from folovllm.engine.request_stream import RequestStream
from folovllm.entrypoints.openai.sse import DONE, EventStream
from folovllm.executor.fake import fake_tokens
from folovllm.learn.toy_server import HeldExecutor, ToyServer, start_toy_llm
from folovllm.sampling_params import RequestOutputKind, SamplingParams

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0, output_kind=RequestOutputKind.DELTA)


async def read(stream: RequestStream, held: HeldExecutor) -> AsyncIterator[list[int]]:
    held.allow(1)
    async for output in stream:
        yield output.outputs[0].token_ids
        held.allow(1)  # the engine takes its next step when this output has been read


async def one_stream_on_the_wire() -> None:
    server, client, wire, held = EventStream(), EventStream(), b"", HeldExecutor()
    async with await start_toy_llm(held) as llm:
        async for token_ids in read(await llm.add_request("a", [1, 2, 3], GREEDY), held):
            wire += server.encode(json.dumps({"token_ids": token_ids}))
    print(f"on the wire: {wire[:58]!r} ...")
    wire += server.encode(DONE)
    *events, done = [event for i in range(0, len(wire), 11) for event in client.feed(wire[i : i + 11])]
    print(f"read again:  {len(events)} events from pieces of 11 bytes, then {done}")
    assert done == DONE and [json.loads(e)["token_ids"] for e in events] == [[i] for i in fake_tokens([1, 2, 3], 12)]


async def a_client_leaves() -> None:
    server = ToyServer(block_size=4)
    streams = {name: server.open(name, prompt=8, max_tokens=24) for name in "abc"}
    for _ in range(4):
        server.step()
    before = server.num_used_blocks
    await streams["b"].aclose()
    print(f"b leaves:    {before} blocks in use, then {server.num_used_blocks}; aborted: {', '.join(server.aborted)}")
    assert (before, server.num_used_blocks, server.aborted) == (9, 6, ["b"]), "free before the next step"


async def a_client_sleeps() -> None:
    held = HeldExecutor()
    async with await start_toy_llm(held) as llm:
        awake, asleep = [await llm.add_request(name, [7, 8, 9], GREEDY) for name in ("awake", "asleep")]
        sizes = [len(token_ids) async for token_ids in read(awake, held)]
        held.go_on()
        late = [len(output.outputs[0].token_ids) async for output in asleep]
    print(f"one sleeps:  the other reads outputs of {sizes} tokens; then it gets outputs of {late}")
    assert sizes == [1] * 12 and sum(late) == 12 and max(late) >= 11, "the engine goes on, and nothing is lost"


for scene in (one_stream_on_the_wire, a_client_leaves, a_client_sleeps):
    asyncio.run(scene())
