"""/v1/models: which models there are. A server has one, under one or several names.

Milestone: M8. vLLM counterpart: vllm/entrypoints/openai/serving_models.py. Left out: LoRA adapters. Ours differs:
`root` is the name as well, and never the folder on the server's disk.
"""

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from folovllm.entrypoints.openai.errors import not_found
from folovllm.entrypoints.openai.state import ServerState, server_state

router = APIRouter()


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "folovllm"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def model_card(state: ServerState, name: str) -> ModelCard:
    return ModelCard(id=name, created=state.created, root=name, max_model_len=state.engine.config.max_model_len)


@router.get("/v1/models")
async def list_models(request: Request) -> ModelList:
    state = server_state(request)
    return ModelList(data=[model_card(state, name) for name in state.model_names])


@router.get("/v1/models/{name:path}")  # a HuggingFace id has a slash
async def get_model(name: str, request: Request) -> ModelCard:
    state = server_state(request)
    if not name:
        raise not_found("a model's name belongs to this path, as in /v1/models/NAME")
    state.check_model(name)
    return model_card(state, name)
