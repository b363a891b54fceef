"""Verification of drafts: which of them stand, and what comes after the last of these.

A draft that its proposer could not have chosen otherwise (DELTA) is judged by choosing: every
position's token is chosen as plain decoding would choose it, and drafts stand as long as they are
what was chosen. The tokens are then those of plain decoding, at any temperature, under any rule; a
draft is accepted with its probability under the target, which no lossless verifier betters
(arXiv 2211.17192, section 2.3, with q concentrated on one token; on a tree this is recursive
rejection, arXiv 2305.09781, algorithm 2, in which the sibling that was chosen is never refused).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.core.plan import Draft
from kvarn.runner.uniform import uniform

Ints = NDArray[np.int64]


@dataclass(slots=True)
class Run:
    """What verification commits: the rows on the way, from the last known token on."""

    rows: list[int]  #: of the span: 0, the last known token; i, draft i - 1, accepted
    tokens: list[int]  #: chosen at these rows: the accepted drafts, and one token more


def walk(chosen: list[int], draft: Draft, most: int) -> Run:
    """Follow the chosen tokens from row to row while a draft says the same.

    `chosen[0]` continues the last known token, `chosen[i + 1]` draft i. At most `most` rows are
    gone: what is chosen at row `most` cannot be used.
    """
    at, rows, tokens = 0, [0], [chosen[0]]
    children = _children(draft)
    while len(rows) < most:
        here = children.get(at, {}).get(chosen[at])
        if here is None:
            break
        at = here
        rows.append(at)
        tokens.append(chosen[at])
    return Run(rows, tokens)


def pretend(chosen: list[int], draft: Draft, share: float, key: int, length: int) -> Run:
    """Accept each draft of a chain with probability `share`, whatever the target says of it.

    For measurements on random weights, whose output means nothing. The same sequence `key` at the
    same `length` always meets the same fate.
    """
    n = len(draft.tokens)
    chance = uniform(np.full(n, key, np.uint64), length + np.arange(n))
    refused = np.flatnonzero(chance >= share)
    accepted = int(refused[0]) if refused.size else n
    return Run(list(range(accepted + 1)), [*draft.tokens[:accepted], chosen[accepted]])


def _children(draft: Draft) -> dict[int, dict[int, int]]:
    """By row: the row of each child by its token; the first of equal siblings counts."""
    found: dict[int, dict[int, int]] = {}
    for i, token in enumerate(draft.tokens):
        parent = i if draft.parents is None else draft.parents[i] + 1
        found.setdefault(parent, {}).setdefault(token, i + 1)
    return found
