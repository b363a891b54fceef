"""Least loaded: the instance with the fewest open requests, then the fewest uncomputed tokens.

Regime: the strongest router that knows nothing of content. Loses prefix hits that a content-aware
router gets.
"""

from kvarn.cluster.fleet import Fleet
from kvarn.cluster.router import Choice
from kvarn.core.part import Part
from kvarn.core.request import Request


class LeastLoaded(Part):
    """Fewest open requests."""

    name, kind = "least_loaded", "router"
    regime = "The default without shared prefixes. Loses the hits of a content-aware router."

    def choose(self, request: Request, fleet: Fleet, now: float) -> Choice:
        """The least loaded of all instances."""
        instance = fleet.least()
        open_, tokens = fleet.requests[instance], fleet.tokens[instance]
        return Choice(
            instance, len(request.prompt), f"fewest open ({open_}, {tokens} tokens to compute)"
        )
