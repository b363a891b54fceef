"""Prefill first: a step is either all new prompts or all decodes (vLLM's first scheduler).

The baseline that chunked prefill is measured against: best time to first token at low load, and a
generation stall for every running decode whenever a prompt comes in.
"""

from kvarn.core.part import Cap, Part
from kvarn.schedule.planner import Planner


class PrefillFirst(Part):
    """Whole prompts before any decode."""

    name, kind, paper = "prefill-first", "scheduler", "2309.06180"
    coasts = True
    needs = frozenset({Cap.PAGED_KV})
    regime = "A baseline: throughput without a TPOT target. Loses on tail time between tokens."

    def plan(self, step: Planner, now: float) -> None:
        """Prompts if there are any, else decodes."""
        for seq in step.running:  # prompts longer than a whole budget go on where they were
            if seq.todo > 1 and step.budget > 0 and seq.tables:
                step.advance(seq, min(seq.todo, step.budget))
        for seq in step.waiting:
            whole = len(seq.tokens) <= step.budget or step.budget == step.chunk
            if step.preempted or not whole or not step.admit(seq):
                break
        if step.plan.spans:
            return
        for seq in step.running:
            if seq.todo == 1 and seq.tables:
                step.advance(seq, 1)
