"""GET /v1/models: the one model that is served."""

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response

from kvarn.serve.http import json_response
from kvarn.serve.service import Service

router = APIRouter()


@router.get("/v1/models")
async def models(http: HTTPRequest) -> Response:
    """The served model."""
    service: Service = http.app.state.service
    return json_response({"object": "list", "data": [_card(service)]})


@router.get("/v1/models/{name:path}")
async def model(http: HTTPRequest, name: str) -> Response:
    """The served model, by its name."""
    service: Service = http.app.state.service
    service.check_model(name)
    return json_response(_card(service))


def _card(service: Service) -> dict[str, Any]:
    card: dict[str, Any] = {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "kvarn",
        "root": service.engine.resolved.config.model,
    }
    if service.engine.info is not None:
        card["max_model_len"] = service.max_len
    return card
