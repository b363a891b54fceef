"""Draft trees in a step: who sees whom, at which position; and what is left where none may be.

The rows of a tree are stored behind the last known token in the order of the draft, but are at the
position of their depth. Deterministic engines and models with sliding windows verify the chain
that is most probable instead, which loses drafts and nothing else: a row's attention by parts is
not the same to the last bit as in one piece, and a row at a greater depth sees a later window than
the last known token, whose view of what is committed the rows of a tree share.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvarn.core.errors import ConfigError
from kvarn.core.plan import Draft, StepPlan
from kvarn.kernels.attention import Ints
from kvarn.kernels.attention.tree import Forest


def is_tree(draft: Draft | None) -> bool:
    """Whether the draft branches; one that does not is a chain, however it is written."""
    if draft is None or draft.parents is None:
        return False
    return draft.parents != list(range(-1, len(draft.tokens) - 1))


def ancestry(parents: list[int]) -> NDArray[np.bool_]:
    """[n, n] whether j is i or an ancestor of i."""
    seen = np.eye(len(parents), dtype=np.bool_)
    for i, parent in enumerate(parents):
        if not -1 <= parent < i:
            raise ConfigError(
                f"draft token {i} names {parent} as its parent; a tree lists parents before their "
                f"children, and -1 for the last committed token"
            )
        if parent >= 0:
            seen[i] |= seen[parent]
    return seen


def grow(trees: Mapping[int, Draft], indptr: Ints, stored: Ints) -> tuple[Forest, Ints]:
    """The trees of a step by span: who sees whom; and the positions [T] of rows `stored` [T]."""
    most = max(len(draft.tokens) for draft in trees.values())
    rows = np.full((len(trees), most), -1, np.int64)
    seen = np.zeros((len(trees), most, most), np.bool_)
    positions = stored.copy()
    for b, (span, draft) in enumerate(trees.items()):
        n = len(draft.tokens)
        assert draft.parents is not None
        mine = ancestry(draft.parents)
        first = int(indptr[span + 1]) - n
        rows[b, :n] = np.arange(first, first + n)
        seen[b, :n, :n] = mine
        positions[first : first + n] = stored[first] - 1 + mine.sum(1)
    return Forest(rows, seen), positions


def path(draft: Draft, row: int) -> list[int]:
    """Draft tokens on the way to judged row `row` of a tree (0: the last known token)."""
    assert draft.parents is not None
    tokens, at = list[int](), row - 1
    while at >= 0:
        tokens.append(draft.tokens[at])
        at = draft.parents[at]
    return tokens[::-1]


def likeliest(draft: Draft) -> Draft:
    """The chain of a tree with the most tokens to be expected of it.

    Of children that were drawn from a known q it is the first: the others are not distributed as q
    says, nor is the surest of them.
    """
    assert draft.parents is not None
    children: dict[int, list[int]] = {}
    for i, parent in enumerate(draft.parents):
        children.setdefault(parent, []).append(i)
    value = [1.0] * len(draft.tokens)  #: tokens to be expected from each on, once it is reached
    best = dict[int, int]()
    for at in range(len(draft.tokens) - 1, -2, -1):
        mine = children.get(at)
        if mine is None:
            continue
        worth = {i: draft.confidence[i] * value[i] for i in mine}
        best[at] = mine[0] if draft.q is not None else max(mine, key=worth.__getitem__)
        if at >= 0:
            value[at] = 1.0 + worth[best[at]]
    chain, at = list[int](), -1
    while at in best:
        at = best[at]
        chain.append(at)
    return Draft(
        [draft.tokens[i] for i in chain],
        None,
        [draft.confidence[i] for i in chain],
        None if draft.q is None else draft.q[chain],
    )


def straightened(plan: StepPlan) -> StepPlan:
    """The plan with a chain in place of every tree; its spans are as many."""
    if not any(is_tree(draft) for draft in plan.drafts.values()):
        return plan
    drafts = {
        seq: likeliest(draft) if is_tree(draft) else draft for seq, draft in plan.drafts.items()
    }
    spans = []
    for span in plan.spans:
        kept = len(drafts[span.seq].tokens) if span.drafts else 0
        spans.append(replace(span, length=span.length - span.drafts + kept, drafts=kept))
    return replace(plan, spans=spans, drafts=drafts)
