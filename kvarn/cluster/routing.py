"""`Routing`: the cluster policy that only routes. One pool of equal instances, no roles."""

from dataclasses import dataclass

from kvarn.cluster.fleet import Fleet
from kvarn.cluster.policy import Action, Arrived, Event, Refuse, Send, Started
from kvarn.cluster.router import Router


@dataclass(slots=True)
class Routing:
    """Send each request where the router says; refuse when every instance is full."""

    router: Router
    fleet: Fleet
    most: int = 1 << 30  #: open requests of one instance before it counts as full

    def handle(self, event: Event, now: float) -> list[Action]:
        """Arrivals are sent on; everything else keeps the picture of the fleet true."""
        if isinstance(event, Arrived):
            return [self._send(event, now)]
        if isinstance(event, Started):
            self.fleet.started(event.request)
        else:
            self.fleet.finished(event.request)
        return []

    def _send(self, event: Arrived, now: float) -> Action:
        request = event.request
        if self.fleet.requests[self.fleet.least()] >= self.most:
            return Refuse(request, f"every instance has {self.most} requests", 1.0)
        choice = self.router.choose(request, self.fleet, now)
        self.fleet.sent(request.id, choice.instance, choice.prompt)
        return Send(request, choice.instance, choice.why)
