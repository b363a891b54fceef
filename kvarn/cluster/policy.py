"""What happens in a cluster, what may be done about it, and who decides. Plain data.

A policy is a state machine: `handle(event, now) -> actions`. A driver supplies the events and
carries out the actions: the simulator's heap in virtual time, or asyncio over real engines. Nothing
in a policy awaits, sleeps or reads a clock.
"""

from dataclasses import dataclass
from typing import Protocol

from kvarn.core.request import Request


@dataclass(slots=True, frozen=True)
class Arrived:
    """A request came in and wants an instance."""

    request: Request


@dataclass(slots=True, frozen=True)
class Started:
    """A request's first token came from an instance: its prompt is computed."""

    request: str
    instance: int


@dataclass(slots=True, frozen=True)
class Finished:
    """A request left an instance: answered, aborted or failed."""

    request: str
    instance: int


Event = Arrived | Started | Finished


@dataclass(slots=True, frozen=True)
class Send:
    """Give a request to an instance."""

    request: Request
    instance: int
    why: str  #: for people: what spoke for this instance


@dataclass(slots=True, frozen=True)
class Refuse:
    """Turn a request away; the client may come back later."""

    request: Request
    why: str
    retry_after: float  #: [s]


Action = Send | Refuse


class ClusterPolicy(Protocol):
    """Decides for a cluster of engines."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about `event`; the same events give the same actions. `now` in seconds."""
        ...
