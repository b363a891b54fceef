"""Request-level batching: a batch starts together and the next one waits until all of it is done.

What serving did before Orca; kept as the floor that continuous batching is measured against.
"""

from kvarn.core.part import Cap, Part
from kvarn.schedule.planner import Planner


class Static(Part):
    """Admit only when nothing runs."""

    name, kind = "static", "scheduler"
    coasts = True
    needs = frozenset({Cap.PAGED_KV})
    regime = "A baseline. Loses everywhere but on equal lengths that arrive together."

    def plan(self, step: Planner, now: float) -> None:
        """Run the batch; take in the next one when it is empty."""
        idle = not step.running
        for seq in step.running:
            if step.budget > 0 and seq.todo > 0 and seq.tables:
                step.advance(seq, min(seq.todo, step.budget))
        if idle and not step.preempted:
            for seq in step.waiting:
                if not step.admit(seq):
                    break
