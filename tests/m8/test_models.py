"""/v1/models, /health, /ping and /version; the names under which a model is served."""

from pathlib import Path

import pytest

from folovllm import __version__
from folovllm.config import ModelConfig
from folovllm.entrypoints.openai.state import served_names
from tests.m8.server_process import running_server

pytestmark = pytest.mark.m8


def test_a_model_is_served_under_all_its_names() -> None:
    with running_server() as server:
        server.state.model_names = ["org/first", "second"]
        cards = server.get("/v1/models").json
        assert cards["object"] == "list" and [card["id"] for card in cards["data"]] == ["org/first", "second"]
        card = server.get("/v1/models/org/first").json
        assert card == cards["data"][0]
        assert (card["object"], card["root"], card["max_model_len"]) == ("model", "org/first", 256)
        assert isinstance(card["created"], int)
        missing = server.get("/v1/models/third")
        assert missing.status == 404 and missing.error["code"] == "model_not_found"
        body = {"prompt": "a", "max_tokens": 1}
        for name in ("org/first", "second", "", None):
            assert server.post("/v1/completions", body | {"model": name}).status == 200, name
        refused = server.post("/v1/completions", body | {"model": "third"})
        assert (refused.status, refused.error["param"]) == (404, "model")


def test_a_model_name_that_no_answer_can_hold_is_a_404() -> None:
    with running_server() as server:
        answer = server.post("/v1/completions", b'{"model": "\\ud83d", "prompt": "a"}')
        assert answer.status == 404 and answer.error["code"] == "model_not_found"


def test_health_ping_and_version() -> None:
    with running_server() as server:
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            answer = server.request(method, path)
            assert (answer.status, answer.body) == (200, b""), path
        assert server.get("/version").json == {"version": __version__}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m", "smollm2-135m"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("/data/models/mine", "mine"),
        ("~/models/mine/", "mine"),
        ("./mine", "mine"),
    ],
)
def test_a_folder_is_served_by_its_last_part(model: str, name: str) -> None:
    """No answer shows where the model lies on the server's disk."""
    assert served_names(ModelConfig(model=model)) == [name]


def test_a_relative_folder_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert served_names(ModelConfig(model="a/mine")) == ["mine"]
    assert served_names(ModelConfig(model="a/mine", served_model_name="x")) == ["x"]
