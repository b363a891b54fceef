"""`Service`: the engine, the tokenizer and the options, as every endpoint sees them."""

import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from kvarn.core.errors import RequestError
from kvarn.core.request import Request
from kvarn.core.validate import Limits, validate
from kvarn.serve.call import Call
from kvarn.serve.client import EngineClient, State
from kvarn.serve.metrics import Metrics
from kvarn.serve.options import ServeOptions

log = logging.getLogger("kvarn.request")


class Tokenizer(Protocol):
    """What the server needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, add_special: bool = True) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...
    def chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str: ...


class Service:
    """The engine, the tokenizer and the options, as the endpoints see them."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer | None,
        options: ServeOptions,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.options = options
        self.metrics = Metrics()
        self.model = options.served_model_name or engine.resolved.config.model
        self.created = int(time.time())
        self.draining = False
        self.tool_format: str | None = None  #: how the model writes calls, once known

    @property
    def max_len(self) -> int:
        """Longest sequence: as the engine has chosen, or the model's own. [tokens]"""
        chosen = self.engine.resolved.config.max_len
        spec = self.engine.info.spec if self.engine.info else None
        return chosen or (spec.max_len if spec else 0)

    @property
    def healthy(self) -> bool:
        """True when new requests are taken."""
        return self.engine.state is State.READY and not self.draining

    def check_model(self, name: str | None) -> None:
        """Raise when a request names another model than the served one."""
        if name is not None and name != self.model:
            raise RequestError(
                f"there is no model {name!r} here; this server serves {self.model!r}",
                param="model",
                code="model_not_found",
                status=404,
            )

    async def submit(self, requests: Sequence[Request], label: str) -> Call:
        """Hand requests to the engine; returns when it has accepted all of them.

        Raises `RequestError` for what the engine would refuse (found here, before anything is laid
        out for a request), for what it did refuse, and when the server takes no more requests.
        """
        if self.draining:
            raise RequestError("the server is shutting down", code="shutting_down", status=503)
        try:
            self._validate(requests)
            call = Call(self.engine, self.metrics, requests, label)
            await call.accepted()
        except RequestError as error:
            self.metrics.refused.labels(error.code).inc(len(requests))
            log.warning("%s  refused: %s", label, error.message.partition("\n")[0])
            raise
        return call

    def _validate(self, requests: Sequence[Request]) -> None:
        info = self.engine.info
        if info is None:
            return
        limits = Limits(info.spec.vocab, self.max_len, has_tokenizer=self.tokenizer is not None)
        for request in requests:
            validate(request, limits)


def new_id(prefix: str) -> str:
    """A fresh id such as "cmpl-1f0c..."."""
    return f"{prefix}-{uuid.uuid4().hex[:24]}"
