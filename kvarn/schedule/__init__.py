"""Which spans run in a step, who is let in, who waits: decisions as functions of state and time."""

from typing import Protocol

from kvarn.schedule.planner import Planner


class Scheduler(Protocol):
    """Parts of kind "scheduler": form one step by calling the planner's verbs."""

    coasts: bool  #: where nobody waits and all decode, it plans one position for each, in order

    def plan(self, step: Planner, now: float) -> None:
        """Advance running sequences, let waiting ones in; preemption follows from lack of pages."""
        ...
