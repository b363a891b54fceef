"""Routers: which instance a request goes to. Parts of kind "router"."""

from dataclasses import dataclass
from typing import Protocol

from kvarn.cluster.fleet import Fleet
from kvarn.core.request import Request


@dataclass(slots=True, frozen=True)
class Choice:
    """An instance, the prompt tokens that it will have to compute, and what spoke for it."""

    instance: int
    prompt: int  #: [tokens]
    why: str


class Router(Protocol):
    """Chooses an instance for each request."""

    def choose(self, request: Request, fleet: Fleet, now: float) -> Choice:
        """Deterministic; may remember what it chose. Ties go to the lowest instance."""
        ...
