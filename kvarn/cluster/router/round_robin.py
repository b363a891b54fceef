"""Round robin: each instance in turn, whatever it does. The baseline that every router must beat.

Regime: equal requests on equal instances. Loses on mixed lengths and on every shared prefix.
"""

from kvarn.cluster.fleet import Fleet
from kvarn.cluster.router import Choice
from kvarn.core.part import Part
from kvarn.core.request import Request


class RoundRobin(Part):
    """Each instance in turn."""

    name, kind = "round_robin", "router"
    regime = "The baseline. Loses on mixed lengths and on shared prefixes."

    def __init__(self) -> None:
        self._next = 0

    def choose(self, request: Request, fleet: Fleet, now: float) -> Choice:
        """The instance after the last one chosen."""
        instance = self._next
        self._next = (instance + 1) % fleet.size
        return Choice(instance, len(request.prompt), f"its turn ({instance} of {fleet.size})")
