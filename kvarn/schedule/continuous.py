"""Continuous batching with chunked prefill: every decode in every step, prompts fill the rest.

Orca (OSDI'22) decides once per model iteration; Sarathi-Serve (arXiv 2403.02310, algorithm 3) adds
chunks under a token budget, so that a long prompt never stalls running decodes.

A prompt's chunk is partial only when the budget is spent, so nobody is let in behind a prompt that
is still incomplete: requests that arrive together find each other's prefix in the index.
"""

from kvarn.core.part import Cap, Part
from kvarn.schedule.planner import Planner


class Continuous(Part):
    """Decodes first, then prompts that have begun, then new requests in order."""

    name, kind, paper = "continuous", "scheduler", "2403.02310"
    coasts = True
    needs = frozenset({Cap.PAGED_KV})
    regime = "The default for every load. Pure prefill throughput gains nothing from it."

    def plan(self, step: Planner, now: float) -> None:
        """Form one stall-free step."""
        begun = []
        for seq in step.running:
            todo = seq.todo
            if todo > 1:
                begun.append(seq)
            elif todo == 1 and seq.tables:  # a sequence preempted in this loop has no tables
                step.advance(seq, 1)
        for seq in begun:
            if step.budget > 0 and seq.tables:
                step.advance(seq, min(seq.todo, step.budget))
        if step.preempted or not step.has_waiting:
            return
        for seq in step.waiting:
            if not step.admit(seq):
                break
