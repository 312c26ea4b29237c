"""Without the extra [ray]: nothing imports Ray, and what needs it says what to install."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from folovllm.config import EngineConfig
from folovllm.engine.ray_client import RayCoreClient

pytestmark = pytest.mark.m10
INSTALL = r"needs Ray: pip install 'folovllm\[ray\]'"


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Ray were not installed."""
    monkeypatch.setitem(sys.modules, "ray", None)


def test_the_executor_is_refused(no_ray, tiny_model_dir):
    from folovllm import LLM

    with pytest.raises(ValueError, match=INSTALL):
        LLM(str(tiny_model_dir("llama")), distributed_executor_backend="ray", max_model_len=64)


def test_the_client_is_refused(no_ray):
    async def make() -> None:
        RayCoreClient(EngineConfig.from_args(data_parallel_backend="ray"), Path("unused"))

    with pytest.raises(ValueError, match=INSTALL):
        asyncio.run(make())


def test_the_serve_application_is_refused(no_ray):
    from folovllm.entrypoints.ray_serve import build_app

    with pytest.raises(ValueError, match=INSTALL):
        build_app({})


def test_an_empty_address_is_refused():
    with pytest.raises(ValueError, match="ray_address must not be empty"):
        EngineConfig.from_args(ray_address="")


def test_data_sets_are_refused(no_ray, tmp_path):
    from folovllm.data import complete, read_results

    with pytest.raises(ValueError, match=INSTALL):
        complete("prompts.jsonl", output=tmp_path)
    with pytest.raises(ValueError, match=INSTALL):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("name", "args"), [("complete_dataset", []), ("serve_app", []), ("tensor_parallel", ["--ranks", "1"])]
)
def test_the_examples_end_with_the_message_alone(name, args, tiny_model_dir):
    """They ended in a traceback with the message below it."""
    script = (
        "import runpy, sys; sys.modules['ray'] = None; script, *sys.argv[1:] = sys.argv[1:];"
        "runpy.run_path(script, run_name='__main__')"
    )
    path = Path(__file__).parents[2] / "scripts" / "ray" / f"{name}.py"
    command = [sys.executable, "-c", script, str(path), "--model", str(tiny_model_dir("llama")), *args]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr
    assert ended.stderr.startswith("error: ") and "needs Ray: pip install 'folovllm[ray]'" in ended.stderr


def test_no_module_imports_ray_before_it_is_used():
    script = (
        "import sys, folovllm.data, folovllm.entrypoints.ray_serve, folovllm.engine.ray_client, folovllm.executor.ray;"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_the_front_end_of_actors_imports_no_torch():
    script = "import sys, folovllm.engine.ray_client, folovllm.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
