"""Verification of drafts: which of them stand, and what comes after the last of these.

A draft that its proposer could not have chosen otherwise (DELTA) is judged by choosing: every
position's token is chosen as plain decoding would choose it, and drafts stand as long as they are
what was chosen. The tokens are then those of plain decoding, at any temperature, under any rule; a
draft is accepted with its probability under the target, which no lossless verifier betters
(arXiv 2211.17192, section 2.3, with q concentrated on one token; on a tree this is recursive
rejection, arXiv 2305.09781, algorithm 2, in which the sibling that was chosen is never refused).

Where drafts were drawn from a known q, `accept` chooses in place of a plain draw, so that they
stand more often: a row's token is the first of its children that is accepted, or else drawn from
what of the target's p the refused ones have left. Its distribution is p, though the token is
another than plain decoding's. The walk from row to row is the same.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.core.plan import Draft
from kvarn.kernels.upload import upload
from kvarn.runner.choose import draw
from kvarn.runner.uniform import UInts, stream, uniform

Ints = NDArray[np.int64]


@dataclass(slots=True)
class SparseQ:
    """`Draft.q` where only `k` tokens of each distribution have a chance."""

    ids: Tensor  #: [tokens, k] int64, distinct in a row
    probs: Tensor  #: [tokens, k]

    def __getitem__(self, at: Any) -> "SparseQ":
        return SparseQ(self.ids[at], self.probs[at])

    def dense(self, vocab: int) -> Tensor:
        """[tokens, vocab]"""
        rows = torch.zeros(len(self.ids), vocab, device=self.probs.device)
        return rows.scatter_(1, self.ids, self.probs.float())


@dataclass(slots=True)
class Drawn:
    """Rows of logits whose children were drawn, one after the other, without replacement."""

    rows: Ints  #: [N] of the logits, rising
    children: Ints  #: [N, m] tokens in the order in which they were drawn; -1: no more
    q: Tensor  #: [N, V] what the first of them was drawn from

    def of(self, which: Ints) -> "Drawn":
        """Some of the rows."""
        if len(which) == len(self.rows):
            return self
        at = torch.from_numpy(which).to(self.q.device)
        return Drawn(self.rows[which], self.children[which], self.q[at])


@dataclass(slots=True)
class Drafted:
    """What the sampler must know of the drafts of a step."""

    drawn: Drawn | None = None
    #: in trees, by row of the logits: what stands before its token from position .. on
    paths: dict[int, tuple[int, list[int]]] = field(default_factory=dict)


def drawn(drafts: Sequence[Draft | None], first: Sequence[int], vocab: int) -> Drawn | None:
    """The judged rows with children of a known q.

    `first`: the row of the logits [R, vocab] that continues the last known token of each span.
    """
    rows, families, parts = list[int](), list[list[int]](), list[Tensor]()
    for draft, base in zip(drafts, first, strict=True):
        if draft is None or draft.q is None or not draft.tokens:
            continue
        found: dict[int, list[int]] = {}
        for i in range(len(draft.tokens)):
            parent = i if draft.parents is None else draft.parents[i] + 1
            found.setdefault(parent, []).append(i)
        eldest = [found[parent][0] for parent in sorted(found)]
        q = draft.q[eldest]
        parts.append(q.dense(vocab) if isinstance(q, SparseQ) else q.float())
        rows += [base + parent for parent in sorted(found)]
        families += [[draft.tokens[i] for i in found[parent]] for parent in sorted(found)]
    if not rows:
        return None
    children = np.full((len(rows), max(map(len, families))), -1, np.int64)
    for at, family in zip(children, families):
        at[: len(family)] = family
    return Drawn(np.array(rows), children, parts[0] if len(parts) == 1 else torch.cat(parts))


def accept(weights: Tensor, drawn: Drawn, keys: UInts, lengths: Ints) -> Tensor:
    """The token [N] of each row: a child that is accepted, or one drawn in place of them all.

    `weights` [N, V] are the target's final probabilities up to a factor a row. Child x is accepted
    with probability min(1, p(x) / q(x)); where it is refused, p becomes norm(max(p - q, 0)), and q
    what the next child was drawn from: q without x (arXiv 2305.09781, algorithm 2; with one child a
    row, arXiv 2211.17192, algorithm 1). A child that q says could not have been drawn is passed
    over. Random numbers come from (key, length) in streams of their own.
    """
    device, most = weights.device, drawn.children.shape[1]
    # the redraw comes first: its stream must not depend on the most children of any row
    chances = [uniform(stream(keys, 1 + j), lengths) for j in range(most + 1)]
    u = upload(chances, torch.float64, device)
    children = upload([drawn.children], torch.int64, device)[0]
    p, q = _normed(weights), drawn.q.to(device)
    tokens = torch.full((len(p),), -1, dtype=torch.int64, device=device)
    for j in range(most):
        child = children[:, j].clamp(min=0)[:, None]
        chance = q.gather(1, child)[:, 0]
        tried = (tokens < 0) & (children[:, j] >= 0) & (chance > 0)
        passes = u[j + 1] * chance < p.gather(1, child)[:, 0]
        tokens = torch.where(tried & passes, children[:, j], tokens)
        left = (p - q).clamp_(min=0.0)
        # rounding may leave nothing of a p that is q
        refused = (tried & ~passes & (left.sum(-1) > 0))[:, None]
        p = torch.where(refused, _normed(left), p)
        if j + 1 < most:
            q = torch.where(tried[:, None], _normed(q.scatter(1, child, 0.0)), q)
    return torch.where(tokens < 0, draw(p, u[0]), tokens)


def _normed(weights: Tensor) -> Tensor:
    """Rows of sum 1; rows of zeros stay as they are."""
    total = weights.sum(-1, keepdim=True, dtype=torch.float64).to(weights.dtype)
    return weights / total.clamp_min(torch.finfo(weights.dtype).tiny)


@dataclass(slots=True)
class Run:
    """What verification commits: the rows on the way, from the last known token on."""

    rows: list[int]  #: of the span: 0, the last known token; i, draft i - 1, accepted
    tokens: list[int]  #: chosen at these rows: the accepted drafts, and one token more


def standing(stands: NDArray[np.bool_], first: Ints) -> Ints:
    """[S] the last judged row on the way of each chain: the first whose draft does not stand.

    `stands` [R]: whether the draft behind each judged row is what was chosen there; False where
    there is none. The rows of chain s begin at `first[s]`.
    """
    ends = np.flatnonzero(~stands)
    found: Ints = ends[np.searchsorted(ends, first)]
    return found


def walk(chosen: list[int], draft: Draft, faulty: Container[int] = ()) -> Run:
    """Follow the chosen tokens from row to row while a draft says the same.

    `chosen[0]` continues the last known token, `chosen[i + 1]` draft i. What is chosen at a
    `faulty` row cannot be used: the walk ends before it.
    """
    at, rows, tokens = 0, [0], [chosen[0]]
    children = _children(draft)
    while True:
        here = children.get(at, {}).get(chosen[at])
        if here is None or here in faulty:
            return Run(rows, tokens)
        at = here
        rows.append(at)
        tokens.append(chosen[at])


def pretend(chosen: list[int], draft: Draft, share: float, key: int, length: int) -> Run:
    """Accept each draft with probability `share`, whatever the target says; of children the first.

    For measurements on random weights, whose output means nothing. The same sequence `key` at the
    same `length` always meets the same fate.
    """
    children, way = _children(draft), [0]
    while way[-1] in children:
        way.append(next(iter(children[way[-1]].values())))
    n = len(way) - 1
    chance = uniform(np.full(n, key, np.uint64), length + np.arange(n))
    refused = np.flatnonzero(chance >= share)
    accepted = int(refused[0]) if refused.size else n
    rows = way[: accepted + 1]
    return Run(rows, [*(draft.tokens[row - 1] for row in rows[1:]), chosen[rows[-1]]])


def _children(draft: Draft) -> dict[int, dict[int, int]]:
    """By row: the row of each child by its token; the first of equal siblings counts."""
    found: dict[int, dict[int, int]] = {}
    for i, token in enumerate(draft.tokens):
        parent = i if draft.parents is None else draft.parents[i] + 1
        found.setdefault(parent, {}).setdefault(token, i + 1)
    return found
