"""What the answers of completions and chat have in common: ids, usage, the stream's frame."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from kvarn.serve.call import Call
from kvarn.serve.http import DONE, event
from kvarn.serve.openai.protocol import Sampling


def head(id: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that every answer and every chunk starts with."""
    return {"id": id, "object": kind, "created": int(time.time()), "model": model}


def tail(call: Call, body: Sampling) -> dict[str, Any]:
    """The fields that a whole answer ends with."""
    end: dict[str, Any] = {"usage": call.usage(), "metrics": call.metrics()}
    if body.timings:
        end["timings"] = call.timings()
    return end


async def stream(
    top: dict[str, Any],
    call: Call,
    body: Sampling,
    chunks: AsyncIterator[list[dict[str, Any]]],
) -> AsyncGenerator[bytes, None]:
    """Events of a stream: one a list of choices, then usage if asked for, then `[DONE]`."""
    options = body.stream_options
    usage = options is not None and options.include_usage
    always = options is not None and options.continuous_usage_stats
    try:
        async for choices in chunks:
            chunk = {**top, "choices": choices}
            if usage or always:
                chunk["usage"] = call.usage() if always else None
            yield event(chunk)
        if usage or body.timings:
            yield event({**top, "choices": [], **tail(call, body)})
        yield DONE
    finally:
        call.close()
