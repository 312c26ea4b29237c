"""The three parts of M8 take a learner's class: in AsyncLLM, in a server, and in the real command (R8.61, R8.62).

The toy server, on which the exercises and the demo play their scenes, is tested here as well.
"""

import asyncio
import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from folovllm.engine.output_collector import RequestOutputCollector
from folovllm.engine.request_stream import RequestStream
from folovllm.entrypoints.cli import app
from folovllm.entrypoints.commands.serve_options import parse_command
from folovllm.learn.contract import signature_mismatch
from folovllm.learn.exercise import Exercise, find_exercises, get_exercise
from folovllm.learn.toy_engine import expected_tokens, make_request
from folovllm.learn.toy_server import HeldExecutor, ToyServer, clients_run, play, start_toy_llm, text_of
from folovllm.parts import PARTS, load_part
from tests.m8.server_process import running_server, serve_process
from tests.m8.serving_helpers import collect, greedy, make_async_llm, oracle, prompt_ids, run_async

pytestmark = pytest.mark.m8

SHOUTING = """
from folovllm.entrypoints.openai.sse import EventStream

class Mine(EventStream):
    def encode(self, data):
        return b": mine\\n" + super().encode(data)
"""
COUNTING = """
from folovllm.engine.output_collector import RequestOutputCollector as Collector
from folovllm.engine.request_stream import RequestStream as Stream

class MyCollector(Collector):
    num_puts = 0
    def put(self, output):
        MyCollector.num_puts += 1
        super().put(output)

class MyStream(Stream):
    pass
"""


# ---- parts


@pytest.mark.parametrize("name", ["engine.output_collector", "engine.request_stream", "serve.event_stream"])
def test_the_parts_have_their_default_classes(name: str) -> None:
    assert load_part(name).__module__ == PARTS[name].default.partition(":")[0]
    assert len(PARTS) <= 20


def test_the_engine_runs_on_replaced_parts(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(COUNTING, encoding="utf-8")
    parts = {"engine.output_collector": f"{file}:MyCollector", "engine.request_stream": f"{file}:MyStream"}

    async def scene() -> None:
        async with make_async_llm(parts=parts) as engine:
            stream: Any = await engine.add_request("a", prompt_ids(1), greedy(5))
            assert type(stream).__name__ == "MyStream"
            assert await collect(stream) == oracle(prompt_ids(1), 5)
            assert type(stream._collector).num_puts == 5

    run_async(scene)


def test_a_server_writes_the_frames_of_a_replaced_part(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SHOUTING, encoding="utf-8")
    with running_server({"parts": {"serve.event_stream": f"{file}:Mine"}}) as server:
        answer = server.post("/v1/completions", {"prompt": "hello", "max_tokens": 3, "stream": True})
        assert answer.status == 200 and answer.body.endswith(b": mine\ndata: [DONE]\n\n")
        assert answer.body.count(b": mine\n") == answer.body.count(b"data: ") == len(answer.events) + 1


def test_serve_takes_parts_and_what_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SHOUTING, encoding="utf-8")
    assert parse_command(["--part", "serve.event_stream=mine.py:Mine"]).engine_args["parts"] == {
        "serve.event_stream": "mine.py:Mine"
    }
    with pytest.raises(ValueError, match=r"no exercise in .*work.* has passed"):
        parse_command(["--mine"])
    solve(get_exercise("m8", "sse_framing"))
    parts = parse_command(["--mine"]).engine_args["parts"]
    assert list(parts) == ["serve.event_stream"]
    own = inspect.getsourcefile(load_part("serve.event_stream", parts).encode)
    assert own is not None and Path(own).resolve() == tmp_path / "work/m8/sse_framing.py"


@pytest.mark.parametrize("exercise", find_exercises("m8"), ids=lambda exercise: exercise.name)
def test_an_exercise_is_passed_from_the_command_line(
    exercise: Exercise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own file, handed in as a learner's file, keeps the contract and passes all checks."""
    monkeypatch.chdir(tmp_path)
    solve(exercise)


def test_aexit_may_take_its_arguments_in_any_form() -> None:
    """Python calls `__aexit__` by position, and `*exc` is the form in which it is usually written."""

    class Mine:
        async def __aexit__(self, *exc: Any) -> None: ...

    class Short:
        async def __aexit__(self, kind: Any) -> None: ...

    assert signature_mismatch(Mine.__aexit__, RequestStream.__aexit__) is None
    assert signature_mismatch(Short.__aexit__, RequestStream.__aexit__) is not None


def solve(exercise: Exercise) -> None:
    """Hands in a solution in the present folder."""
    source = inspect.getsourcefile(exercise.reference_class)
    assert source is not None
    work_file = exercise.work_file(Path("work"))
    work_file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, work_file)
    result = CliRunner().invoke(app, ["learn", "m8", "check", exercise.name])
    assert result.exit_code == 0, result.output


@pytest.mark.slow
@pytest.mark.weights
def test_the_real_command_serves_with_a_replaced_class(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SHOUTING, encoding="utf-8")
    with serve_process("--part", f"serve.event_stream={file}:Mine") as server:
        answer = server.post("/v1/completions", {"prompt": "The sea", "max_tokens": 4, "stream": True})
        assert answer.status == 200 and answer.body.endswith(b": mine\ndata: [DONE]\n\n")


# ---- the ladder


def test_the_difference_to_m7_is_no_argument() -> None:
    output = CliRunner().invoke(app, ["learn", "diff", "m7", "m8"]).output
    assert "none: the engine is the same" in output and "engine.output_collector" in output


# ---- the toy server


def test_the_toy_server_gives_each_client_its_tokens() -> None:
    async def scene() -> dict[str, list[int]]:
        server = ToyServer(num_kv_blocks=17, max_num_seqs=2)  # some wait, some are preempted
        streams = {name: server.open(name, prompt=6, max_tokens=20) for name in "abcd"}
        texts = {}

        async def client(name: str) -> None:
            outputs = [output.outputs[0] async for output in streams[name]]
            texts[name] = [token_id for output in outputs for token_id in output.token_ids]
            assert "".join(output.text for output in outputs) == text_of(texts[name])

        await asyncio.gather(server.serve(), *map(client, streams))
        assert server.num_used_blocks == 0 and not server.aborted
        return texts

    assert play(scene()) == {name: expected_tokens(make_request(name, 6, 20), 64) for name in "abcd"}


def test_a_scene_that_hangs_is_an_error_and_one_that_raises_raises() -> None:
    async def hangs() -> None:
        await RequestOutputCollector(greedy().output_kind).get()

    async def raises() -> None:
        raise LookupError("of the scene")

    with pytest.raises(AssertionError, match=r"never comes.*: hangs > get > wait$"):
        play(hangs(), seconds=0.05)
    with pytest.raises(LookupError, match="of the scene"):
        play(raises())


def test_aborting_on_the_toy_server_ends_the_stream() -> None:
    async def scene() -> list[str | None]:
        server = ToyServer()
        stream = server.open("a")
        server.step()
        server.abort("a")
        server.abort("a")
        assert server.num_used_blocks == 0 and server.aborted == ["a", "a"]
        return [output.outputs[0].finish_reason async for output in stream]

    assert play(scene()) == ["abort"]  # merged with the token that was not read


def test_steps_are_held_until_they_are_allowed() -> None:
    async def scene() -> tuple[int, list[int]]:
        held = HeldExecutor()
        async with await start_toy_llm(held) as llm:
            stream: RequestStream = await llm.add_request("a", [1, 2, 3], greedy(6))
            await clients_run()
            assert llm.stats.num_generation_tokens == 0
            held.allow(1)
            first = (await anext(stream)).outputs[0].token_ids
            held.go_on()
            return len(first), first + await collect(stream)

    num_first, token_ids = play(scene(), seconds=30)
    assert num_first == 1 and token_ids == expected_tokens(make_request("a", [1, 2, 3], 6), 64)
