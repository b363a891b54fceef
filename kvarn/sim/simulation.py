"""`simulate`: requests, instances and a cluster policy under one virtual clock.

The policy and the control planes are those of the real engine and cluster. Deterministic: virtual
time is in integer nanoseconds, arrivals come before completions of the same instant, and equal
events in the order in which they were scheduled. What the simulator itself takes never enters.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from kvarn.cluster.policy import Action, Arrived, ClusterPolicy, Finished, Refuse, Send, Started
from kvarn.core.errors import QueueFull
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.sim.heap import ARRIVAL, COMPLETION, NS, Alarm, EventHeap
from kvarn.sim.instance import Instance
from kvarn.sim.run import Outcome, Record, Tally

ABORTED = "aborted"  #: the error of a request that was dropped on the way
_NEXT = "the next listed request arrives"


def unlike_any(seq: Seq) -> int:
    """A generated token that no prompt and no other sequence of the instance has."""
    return -1 - seq.id


class Simulation:
    """One run. `requests` come in order of arrival (seconds) and are taken one at a time."""

    def __init__(
        self,
        requests: Iterable[Request],
        instances: Sequence[Instance],
        policy: ClusterPolicy,
        tally: Tally,
        after: Callable[[str, float], Sequence[Request]] | None = None,
    ) -> None:
        """`after(id, now)`: requests that the end of one brings (the next turn of a session)."""
        self.requests = iter(requests)
        self.instances = list(instances)
        self.policy = policy
        self.tally = tally
        self.after = after
        self.heap = EventHeap()
        self._order: list[Record] = []
        self._left: dict[str, int] = {}  #: sequences of each open request
        self._unwanted: dict[int, list[str]] = {}  #: requests to be dropped, by instance
        self._upcoming: Request | None = None
        self._next_arrival()

    def run(self) -> Outcome:
        """To the end: every request has ended exactly once."""
        heap = self.heap
        while heap:
            event = heap.pop()
            if isinstance(event, Request):
                self.arrived(event)
            elif event is _NEXT:
                self._take_next()
            elif isinstance(event, Alarm):
                event.ring()
            else:
                self._completed(*event)
        tally = self.tally
        return Outcome(
            self._order, tally.gaps, tally.steps, self.instances, heap.now, tally.page_use
        )

    # events

    def _next_arrival(self) -> None:
        """Have the next listed request come when it is due; the list is read no further."""
        self._upcoming = next(self.requests, None)
        if self._upcoming is not None:
            self.heap.push(self._due(self._upcoming), ARRIVAL, _NEXT)

    def _take_next(self) -> None:
        request = self._upcoming
        assert request is not None
        self._next_arrival()
        self.arrived(request)

    def _due(self, request: Request) -> int:
        return max(self.heap.now, round(request.arrival * NS))

    def arrived(self, request: Request) -> None:
        """A request comes in now, and the policy decides."""
        record = Record(request.id, self.heap.now, len(request.prompt))
        self.tally.records[request.id] = record
        self._order.append(record)
        self._act(self.policy.handle(Arrived(request), self.heap.now / NS))

    def abort(self, request: str) -> None:
        """Nobody wants an answer any more: drop a request that was sent to an instance.

        Its pages are free when the step under way ends, as where an engine is told between steps.
        """
        place = self.tally.records[request].instance
        if place >= 0:
            self._unwanted.setdefault(place, []).append(request)
            if self.instances[place].is_busy:
                self._interrupt(place)
            else:
                self.heap.push(self.heap.now, COMPLETION, Alarm(partial(self._drop, place)))

    def _drop(self, place: int) -> None:
        now = self.heap.now
        for request in self._unwanted.pop(place, ()):
            for seq in self.instances[place].abort(request, now):
                self.tally.ended(seq, now, ABORTED)
            if self._left.pop(request, 0):
                self._tell(Finished(request, place))

    def _completed(self, place: int, version: int) -> None:
        instance, now = self.instances[place], self.heap.now
        if version != instance.version:
            return  # cut short by an arrival: another end is in the heap
        for one in instance.finish(now, unlike_any):
            if one.tokens and one.seq.first_token_at == now / NS:
                self._tell(Started(one.seq.request.id, place))
            if one.finish is not None:
                self._ended(place, one.seq, "" if one.finish != "error" else "failed")
        self._drop(place)
        self._start(place)

    def _ended(self, place: int, seq: Seq, error: str = "") -> None:
        """A sequence has ended; its request has with the last of them."""
        now, name = self.heap.now, seq.request.id
        self.tally.ended(seq, now, error)
        self._left[name] -= 1
        if self._left[name]:
            return
        del self._left[name]
        self._tell(Finished(name, place))
        if self.after is not None:
            for request in self.after(name, now / NS):
                self.heap.push(self._due(request), ARRIVAL, request)

    # actions

    def _tell(self, event: Started | Finished) -> None:
        self._act(self.policy.handle(event, self.heap.now / NS))

    def _act(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._send(action)
            elif isinstance(action, Refuse):
                self._refuse(action.request, action.why)

    def _send(self, action: Send) -> None:
        request, place = action.request, action.instance
        record, instance = self.tally.records[request.id], self.instances[place]
        record.instance, record.why = place, action.why
        if instance.is_busy:
            self._interrupt(place)
        try:
            instance.add(request)
        except QueueFull as error:
            self._refuse(request, str(error))
            self._tell(Finished(request.id, place))
            return
        self._left[request.id] = request.sampling.n
        if not instance.is_busy:
            self._start(place)

    def _interrupt(self, place: int) -> None:
        """Something happens to a busy instance: its run ends with the step under way."""
        instance = self.instances[place]
        end = instance.noticed(self.heap.now, unlike_any)
        if end is not None:
            self.heap.push(end, COMPLETION, (place, instance.version))

    def _refuse(self, request: Request, why: str) -> None:
        self.tally.records[request.id].error = why

    def _start(self, place: int) -> None:
        instance, now = self.instances[place], self.heap.now
        end = instance.start(now)
        while end is None:
            seq = instance.unstick(now)
            if seq is None:
                return
            self._ended(place, seq, f"no room for {len(seq.tokens)} tokens in the KV cache")
            end = instance.start(now)
        self.heap.push(end, COMPLETION, (place, instance.version))
