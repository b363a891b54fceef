"""`Run`: the steps that an instance has under way, equal ones as one stretch."""

from dataclasses import dataclass, field
from typing import NamedTuple

from kvarn.core.plan import StepPlan
from kvarn.cost.shape import Estimate, StepShape
from kvarn.sim.heap import NS


class Stretch(NamedTuple):
    """Steps in a row that take the same time."""

    start: int  #: [ns]
    tick: int  #: of each step [ns]
    steps: int
    price: Estimate  #: of each step


@dataclass(slots=True)
class Run:
    """Steps under way: one that was planned, or several decode steps that are taken at once."""

    shape: StepShape  #: of the first step
    start: int  #: [ns]
    plan: StepPlan | None  #: None: the steps are coasted
    committed: bool = False  #: its tokens are in the books before its end
    end: int = 0  #: of the last step [ns]
    steps: int = 0
    stretches: list[Stretch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.end = self.start

    def take(self, price: Estimate, steps: int = 1) -> None:
        """`steps` more at one price, each at least a tick long."""
        tick = max(1, round(price.seconds * NS))
        self.stretches.append(Stretch(self.end, tick, steps, price))
        self.end += steps * tick
        self.steps += steps

    def ended(self, now: int) -> int:
        """How many of its steps end before `now`."""
        return sum(
            min(max((now - 1 - stretch.start) // stretch.tick, 0), stretch.steps)
            for stretch in self.stretches
        )

    def keep(self, steps: int) -> None:
        """Drop all but the first `steps`, at least one."""
        kept, left = [], steps
        for stretch in self.stretches:
            kept.append(stretch._replace(steps=min(left, stretch.steps)))
            left -= kept[-1].steps
            if not left:
                break
        self.stretches, self.steps = kept, steps
        self.end = kept[-1].start + kept[-1].steps * kept[-1].tick

    def began(self, step: int) -> float:
        """When step number `step` of the run begins [s]."""
        for stretch in self.stretches:
            if step < stretch.steps:
                return (stretch.start + step * stretch.tick) / NS
            step -= stretch.steps
        raise IndexError(f"the run has {self.steps} steps")

    def spent(self, joules: float, unmeasured: float) -> tuple[float, float]:
        """Energy [J], and time that no measured data covers [s], on top of those before it.

        Added up step by step: the digits are the same whatever steps were taken together.
        """
        for _, _, steps, price in self.stretches:
            more, guessed = price.joules, (1.0 - price.confidence) * price.seconds
            for _ in range(steps):
                joules += more
                unmeasured += guessed
        return joules, unmeasured

    def gaps(self) -> list[tuple[int, int]]:
        """Between the ends of its steps, in order: (ns, how many in a row)."""
        found = [(stretch.tick, stretch.steps) for stretch in self.stretches]
        tick, steps = found[0]
        if steps == 1:
            return found[1:]
        found[0] = (tick, steps - 1)
        return found
