"""GET /metrics: the numbers of the server, for Prometheus.

Milestone: M8. vLLM counterpart: mount_metrics in vllm/entrypoints/openai/api_server.py. The page needs no API key, as
in vLLM: it holds no text of any request.
"""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from folovllm.entrypoints.openai.state import server_state
from folovllm.metrics.prometheus import CONTENT_TYPE

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(raw_request: Request) -> Response:
    """The text format of Prometheus. Written on the event loop, where the numbers change, in two milliseconds or so."""
    return Response(server_state(raw_request).metrics.page(), media_type=CONTENT_TYPE)
