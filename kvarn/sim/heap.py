"""`EventHeap`: what happens next, in virtual time. Ties go to arrivals, then to who came first."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NS = 1_000_000_000  #: of a second; virtual time is an integer, so that sums never drift

ARRIVAL, COMPLETION = 0, 1  #: ranks of events at the same instant


@dataclass(slots=True, frozen=True)
class Alarm:
    """An event of whoever shares the heap with a simulation."""

    ring: Callable[[], None]


@dataclass(slots=True)
class EventHeap:
    """Events by time [ns]; popping one moves the clock."""

    now: int = 0  #: [ns]
    _heap: list[tuple[int, int, int, Any]] = field(default_factory=list)
    _pushed: int = 0

    def push(self, at: int, rank: int, event: Any) -> None:
        """Let `event` happen at `at`, never before now."""
        if at < self.now:
            raise ValueError(f"an event at {at} ns is before the clock ({self.now} ns)")
        heapq.heappush(self._heap, (at, rank, self._pushed, event))
        self._pushed += 1

    def pop(self) -> Any:
        """The next event; the clock moves to it."""
        self.now, _, _, event = heapq.heappop(self._heap)
        return event

    def __len__(self) -> int:
        return len(self._heap)
