"""POST /v1/embeddings."""

import base64
import math
import struct
import time
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from starlette.responses import Response

from kvarn.core.request import Request
from kvarn.serve.call import Call
from kvarn.serve.docs import documented
from kvarn.serve.http import json_response, read, unless_gone
from kvarn.serve.openai.protocol import EmbeddingRequest
from kvarn.serve.service import Service, new_id
from kvarn.serve.text import prompts

router = APIRouter()


@router.post("/v1/embeddings", openapi_extra=documented(EmbeddingRequest))
async def embeddings(http: HTTPRequest) -> Response:
    """One vector for each input: the mean of the last layer's states, or the last one."""
    service: Service = http.app.state.service
    arrival = time.monotonic()
    body = await read(http, EmbeddingRequest, service.options.max_body)
    service.check_model(body.model)
    inputs = await prompts(service, body.input, body.add_special_tokens, "input")
    requests = [
        Request(
            id=new_id("req"),
            prompt=ids,
            priority=body.priority,
            arrival=arrival,
            pooling=body.pooling,
        )
        for ids in inputs
    ]
    call = await service.submit(requests, http.state.request_id)
    try:
        vectors = await unless_gone(http, _collect(call))
    finally:
        call.close()
    data = [
        {"object": "embedding", "index": index, "embedding": _encode(vector, body)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": call.n_prompt, "total_tokens": call.n_prompt}
    return json_response({"object": "list", "data": data, "model": service.model, "usage": usage})


async def _collect(call: Call) -> list[list[float]]:
    vectors: list[list[float]] = [[] for _ in call.requests]
    async for output in call.outputs():
        if output.embedding is not None:
            vectors[call.position[output.request_id]] = output.embedding
    return vectors


def _encode(vector: list[float], body: EmbeddingRequest) -> Any:
    if body.normalize:
        length = math.sqrt(sum(x * x for x in vector))
        vector = [x / length for x in vector] if length else vector
    if body.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return vector
