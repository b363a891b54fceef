"""Orca's iteration-level scheduling: prompts and decodes in one batch, output reserved up front.

Orca (Yu et al., OSDI'22, algorithm 1): first come, first served at the level of iterations; room
for `max_tokens` is reserved at admission, so that nothing is ever preempted.
"""

from kvarn.core.part import Cap, Part
from kvarn.core.seq import Seq
from kvarn.schedule.planner import Planner


class Orca(Part):
    """Admit while the whole of every running request, output included, fits."""

    name, kind, paper = "orca", "scheduler", "OSDI'22"
    coasts = True
    needs = frozenset({Cap.PAGED_KV})
    regime = "A baseline: no preemption. Loses batch size to reservations that outputs never fill."

    def plan(self, step: Planner, now: float) -> None:
        """Older requests never run fewer iterations than younger ones."""
        for seq in step.running:
            if step.budget > 0 and seq.todo > 0:
                step.advance(seq, min(seq.todo, step.budget))
        reserved = sum(self._pages(step, seq) for seq in step.running)
        for seq in step.waiting:
            reserved += self._pages(step, seq)
            if reserved > min(step.kv.pages) or not step.admit(seq):
                break

    def _pages(self, step: Planner, seq: Seq) -> int:
        """Pages that `seq` can come to hold, the copy of a fork's last page included."""
        return -(-seq.goal // step.kv.page_size) + 1
