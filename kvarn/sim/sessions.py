"""Sessions that share one device in turn: who is resident, who comes back, who waits. Virtual time.

The closed forms of `kvarn.cost.session` say what a turn costs; here users queue for the device
(first come, first served, one turn at a time), their contexts grow with the answers, and the KV of
the least recently served user gives way where memory is full. What comes back is either swapped in
from the host, after another was swapped out, or computed again.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from kvarn.core.errors import ConfigError
from kvarn.cost.session import Channel, SessionModel, Workload
from kvarn.sim.heap import ARRIVAL, COMPLETION, NS, EventHeap

Back = Literal["swap", "recompute"]


@dataclass(slots=True, frozen=True)
class Service:
    """How a device serves sessions."""

    resident: int  #: users whose KV fits beside each other
    back: Back = "swap"  #: how KV that gave way comes back
    random_think: bool = False  #: exponential thought of the same mean, instead of a constant one
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resident < 1:
            raise ConfigError(f"memory must hold at least one user's KV, got {self.resident}")


@dataclass(slots=True)
class Totals:
    """What was served, in a stretch of time."""

    seconds: float = 0.0  #: of the stretch
    sessions: int = 0
    turns: int = 0  #: but for first ones
    returns: int = 0  #: turns whose KV had to come back
    spent: dict[Channel, float] = field(default_factory=dict)  #: device time by channel [s]

    @property
    def per_hour(self) -> float:
        """Sessions an hour."""
        return 3600.0 * self.sessions / self.seconds

    @property
    def missed(self) -> float:
        """Share of later turns whose KV had gone."""
        return self.returns / self.turns if self.turns else 0.0


class Sessions:
    """`users` in a closed loop: a session, then the next, each of `load`."""

    def __init__(self, model: SessionModel, load: Workload, users: int, how: Service) -> None:
        if users < 1:
            raise ConfigError(f"users must be at least 1, got {users}")
        self.model, self.load, self.how = model, load, how
        self.totals = Totals()
        self._heap = EventHeap()
        self._rng = Random(how.seed)
        self._turn = [0] * users
        self._queue: deque[int] = deque()
        self._served: int | None = None  # the user on the device
        self._here: OrderedDict[int, None] = OrderedDict()  # KV on the device, last used last
        for user in range(users):
            self._heap.push(0, ARRIVAL, user)

    def run(self, sessions: int) -> Totals:
        """Until `sessions` more have ended; what happened in that time."""
        before, self.totals = self._heap.now, Totals()
        while self.totals.sessions < sessions:
            self._next()
        self.totals.seconds = (self._heap.now - before) / NS
        return self.totals

    def _next(self) -> None:
        user = self._heap.pop()
        if user is None:
            self._leave()
        else:
            self._queue.append(user)
        if self._served is None and self._queue:
            self._served = self._queue.popleft()
            seconds = self._serve(self._served)
            self._heap.push(self._heap.now + round(seconds * NS), COMPLETION, None)

    def _leave(self) -> None:
        """The turn on the device ends; its user thinks."""
        user, self._served = self._served, None
        assert user is not None
        self._turn[user] += 1
        if self._turn[user] == self.load.turns:
            self._turn[user] = 0
            self.totals.sessions += 1
            del self._here[user]
        think = self.load.think
        if self.how.random_think and think:
            think = self._rng.expovariate(1 / think)
        self._heap.push(self._heap.now + round(think * NS), ARRIVAL, user)

    def _serve(self, user: int) -> float:
        """Device time of the turn [s]."""
        first, context = self._turn[user] == 0, self._context(user)
        spent: dict[Channel, float] = {"prefill": 0.0, "switch": 0.0}
        self.totals.turns += not first
        if first:
            spent["prefill"] = self.model.prefill(context)
        elif user not in self._here:
            self.totals.returns += 1
            if self.how.back == "recompute":
                spent["prefill"] = self.model.prefill(context)
            else:
                spent["switch"] = self._move(context)
        if user not in self._here and len(self._here) == self.how.resident:
            out, _ = self._here.popitem(last=False)
            if self.how.back == "swap":
                spent["switch"] += self._move(self._context(out))
        self._here[user] = None
        self._here.move_to_end(user)
        answer = self.load.answer
        spent["decode"] = answer * self.model.decode(context + answer // 2)
        for channel, seconds in spent.items():
            self.totals.spent[channel] = self.totals.spent.get(channel, 0.0) + seconds
        return sum(spent.values())

    def _context(self, user: int) -> int:
        """Positions at the start of the user's turn."""
        return self.load.context + self._turn[user] * self.load.answer

    def _move(self, context: int) -> float:
        """One way over the host link [s]."""
        return self.model.switch(context) / 2


def simulate(
    model: SessionModel, load: Workload, users: int, how: Service, each: int = 20
) -> Totals:
    """Steady state: `each` sessions a user, after a third as many that are not counted."""
    sessions = Sessions(model, load, users, how)
    sessions.run(max(1, each // 3) * users)
    return sessions.run(each * users)
