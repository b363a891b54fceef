"""The ASGI application: routers, error handlers and the gate around them."""

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel

from kvarn import __version__
from kvarn.serve import errors, native, ops, tokens
from kvarn.serve.docs import describe
from kvarn.serve.http import Gate
from kvarn.serve.openai import chat, completions, embeddings, models
from kvarn.serve.openai.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from kvarn.serve.service import Service

ROUTERS = (completions, chat, embeddings, models, tokens, native, ops)
BODIES: list[type[BaseModel]] = [
    CompletionRequest,
    ChatRequest,
    EmbeddingRequest,
    TokenizeRequest,
    DetokenizeRequest,
    native.GenerateRequest,
]


def build(service: Service) -> FastAPI:
    """The application around one service."""
    app = FastAPI(title="kvarn", version=__version__, redoc_url=None)
    app.state.service = service
    for module in ROUTERS:
        app.include_router(module.router)
    errors.install(app)
    describe(app, BODIES)
    app.add_middleware(Gate, options=service.options)
    if service.options.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.options.cors),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return app
