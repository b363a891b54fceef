"""Errors that say what was wrong and what would work.

A `RequestError` belongs to one request: the engine, the other requests and their KV live on.
A `ConfigError` or `ModelError` is raised before anything runs.
"""

import difflib
from collections.abc import Iterable


class KvarnError(Exception):
    """Base of every error that kvarn raises on purpose."""


class ConfigError(KvarnError):
    """An option, or a combination of options, that cannot be honoured."""


class ModelError(KvarnError):
    """A model that cannot be found, read or run."""


class RequestError(KvarnError):
    """A request that cannot be served; the message goes to the client as it is.

    `param` names the offending field, `code` is a stable word for programs, `status` the HTTP code.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


class QueueFull(RequestError):
    """The waiting queue is at its limit; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, code="queue_full", status=429)
        self.retry_after = retry_after


class EngineDied(KvarnError):
    """The engine process ended while requests were open."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the closest known word, or the whole list when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
