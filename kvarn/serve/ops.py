"""Endpoints for those who run the server: health, metrics, what is in force, the prefix cache."""

import asyncio
import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response

from kvarn import __version__
from kvarn.core.errors import EngineDied
from kvarn.core.output import EngineStats
from kvarn.serve.http import json_response
from kvarn.serve.service import Service

router = APIRouter()

PATIENCE = 2.0  #: how long a scrape waits for a step to end before it shows the last snapshot [s]


@router.get("/health")
@router.get("/ping", include_in_schema=False)
async def health(http: HTTPRequest) -> Response:
    """200 when requests are taken, else 503."""
    service: Service = http.app.state.service
    status = "draining" if service.draining else service.engine.state.value
    return json_response({"status": status}, 200 if service.healthy else 503)


@router.get("/version")
async def version() -> Response:
    """Version of kvarn."""
    return json_response({"version": __version__})


@router.get("/metrics")
async def metrics(http: HTTPRequest) -> Response:
    """Prometheus text."""
    service: Service = http.app.state.service
    engine = service.metrics.engine
    engine.ready, engine.restarts = service.healthy, service.engine.restarts
    stats = await _stats(service)
    if stats is not None:
        engine.stats = stats
    text = service.metrics.render()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _stats(service: Service) -> EngineStats | None:
    """A snapshot; None when the engine is down or busy for longer than `PATIENCE`."""
    try:
        return await asyncio.wait_for(service.engine.stats(), PATIENCE)
    except (EngineDied, TimeoutError):
        return None


@router.get("/server_info")
@router.get("/get_server_info", include_in_schema=False)
async def server_info(http: HTTPRequest) -> Response:
    """Options in force, the model's shape, capabilities, memory, and the engine's counters."""
    service: Service = http.app.state.service
    engine = service.engine
    stats = await _stats(service)
    info: dict[str, Any] = {
        "version": __version__,
        "model": service.model,
        "state": engine.state.value,
        "restarts": engine.restarts,
        "uptime_seconds": time.time() - service.created,
        "engine_pid": engine.pid,
        "open_requests": engine.n_open,
        "stats": None if stats is None else asdict(stats),
    }
    if engine.info is not None:
        info["spec"] = asdict(engine.info.spec)
        info["explain"] = engine.info.explain
        info["startup_seconds"] = engine.info.seconds
    return json_response(info)


@router.post("/reset_prefix_cache")
@router.post("/flush_cache", include_in_schema=False)
async def reset_prefix_cache(http: HTTPRequest) -> Response:
    """Forget cached prefixes; 409 when some are in use."""
    service: Service = http.app.state.service
    done = await service.engine.reset_prefix_cache()
    return json_response({"success": done}, 200 if done else 409)
