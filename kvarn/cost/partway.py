"""A step some of whose rows leave after the first layers, priced as what it is of whole steps.

Layers cost alike, so n of L layers cost n/L of a step through all of them with the same rows.
"""

from collections.abc import Sequence
from dataclasses import fields

from kvarn.cost.shape import CostModel, Estimate, shape_of

#: (first position, rows, wants logits, layers that see it: 0 for all)
Partial = tuple[int, int, bool, int]


def partway(cost: CostModel, spans: Sequence[Partial], n_layers: int) -> Estimate:
    """Time and energy of the step, in a model of `n_layers`."""
    total, sure, before = Estimate(), 0.0, 0
    for end in sorted({span[3] or n_layers for span in spans}):
        there = [span[:3] for span in spans if (span[3] or n_layers) >= end]
        part, share = cost.step(shape_of(there)), (end - before) / n_layers
        for one in fields(Estimate):
            setattr(total, one.name, getattr(total, one.name) + share * getattr(part, one.name))
        sure += part.confidence * share * part.seconds
        before = end
    total.confidence = sure / total.seconds if total.seconds else 0.0
    return total
