"""Routes that say how the server is: /health, /ping and /version.

Milestone: M8. vLLM counterpart: the routes of these names in vllm/entrypoints/openai/api_server.py.
"""

from fastapi import APIRouter, Request, Response

from folovllm import __version__
from folovllm.engine.async_llm import EngineDeadError
from folovllm.entrypoints.openai.errors import ApiError
from folovllm.entrypoints.openai.state import server_state

router = APIRouter()


@router.get("/health", response_class=Response)
async def health(request: Request) -> Response:
    """200 if the server takes requests and an engine computes them.

    503 while the server shuts down, while all engines are being started again (new requests wait), and if the engine
    has stopped: then with the cause.
    """
    state = server_state(request)
    try:
        state.engine.check_health()
    except EngineDeadError as error:
        raise ApiError(503, f"the engine has stopped: {error}") from None
    if state.is_draining:
        raise ApiError(503, "the server is draining: it ends when the open answers have ended")
    if not state.engine.num_alive:
        raise ApiError(503, "all engines have died and are being started again; requests wait meanwhile")
    return Response()


@router.get("/ping", response_class=Response)
@router.post("/ping", response_class=Response)
async def ping(request: Request) -> Response:
    """The same as /health, under the name that SageMaker asks for."""
    return await health(request)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}
