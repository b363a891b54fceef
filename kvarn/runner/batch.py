"""From spans to arrays: the rows of a step, flattened, and their page lists by group."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvarn.core.model import GroupSpec, ModelSpec
from kvarn.core.plan import Draft, SeqId, Span
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.tree import Forest
from kvarn.runner.image import Image
from kvarn.runner.shared import neighbours, runs
from kvarn.runner.state import DeviceState
from kvarn.runner.trees import grow, is_tree

Ints = NDArray[np.int64]
ON_DEVICE = -1  #: a token whose value only the device knows yet; -2, ..: drafts behind it


@dataclass(slots=True)
class Batch:
    """One step's T rows in S spans, on the host."""

    spans: Ints  #: [S] which span of the plan each is
    rows: Ints  #: [S] image row of each span
    indptr: Ints  #: [S+1] first flattened row of each span
    ends: Ints  #: [S] position after each span's last
    row_of: Ints  #: [T] image row of each flattened row
    tokens: Ints  #: [T]; from `ON_DEVICE` down for what a step in flight samples, or drafts
    positions: Ints  #: [T]; of a tree's rows, by depth: they are stored one after the other
    angles: Ints  #: [T] positions that queries and keys are rotated by
    groups: list[PagedRows]
    logits_at: Ints  #: flattened rows whose logits choose a token, in the order of the spans
    logits_spans: Ints  #: the spans they belong to, as indices of `rows`
    drafts: list[Draft | None]  #: [S] what the last rows of each span propose; []: nothing at all
    forest: Forest | None = None  #: the trees among the drafts

    @property
    def decodes(self) -> bool:
        """Whether every span is one row that chooses a token."""
        return self.chooses and len(self.tokens) == len(self.rows)

    @property
    def chooses(self) -> bool:
        """Whether every row chooses a token: spans are one known token and its drafts, no tree."""
        return len(self.logits_at) == len(self.tokens) and self.forest is None

    def settle(self) -> None:
        """Wait for the drafts that were being made when it was laid out, and put them in."""
        late = [draft for draft in self.drafts if draft is not None and draft.late is not None]
        if late:
            for draft in late:
                draft.settle()
            unknown = np.flatnonzero(self.tokens < ON_DEVICE)
            self.tokens[unknown] = [token for draft in late for token in draft.tokens]

    @property
    def lengths(self) -> Ints:
        """Tokens before each one that the logits choose [tokens]."""
        return self.positions[self.logits_at] + 1


def build(
    spans: list[Span],
    image: Image,
    spec: ModelSpec,
    groups: list[GroupSpec],
    state: DeviceState | None = None,
    drafts: Mapping[SeqId, Draft] | None = None,
) -> Batch:
    """Lay out a step. A handful of numpy calls, whatever the number of spans.

    With `state` the page lists are the device's own tables, and sequences that share a prefix
    become neighbours in a step of single rows.
    """
    rows = image.rows([span.seq for span in spans])
    start = np.array([span.start for span in spans], np.int64)
    length = np.array([span.length for span in spans], np.int64)
    wants = np.array([span.wants_logits for span in spans], np.bool_)
    order = np.arange(len(spans))
    single = len(spans) == int(length.sum())
    if state is not None and single:
        order = neighbours(image.tables[0], rows)
        rows, start, wants = rows[order], start[order], wants[order]
    indptr = _indptr(length)
    if single:
        row_of, positions = rows, start
    else:
        row_of = np.repeat(rows, length)
        positions = np.repeat(start - indptr[:-1], length) + np.arange(indptr[-1])
    ends = start + length
    tokens = image.tokens[row_of, positions].astype(np.int64)
    unknown = positions >= image.filled[row_of]
    if unknown.any():
        tokens = np.where(unknown, ON_DEVICE + image.known[row_of] - 1 - positions, tokens)
    proposed = [drafts.get(spans[i].seq) for i in order.tolist()] if drafts else []
    layout = _Layout(image, spec, rows, start, ends, indptr, row_of, positions, state, single)
    trees = {s: draft for s, draft in enumerate(proposed) if draft is not None and is_tree(draft)}
    forest = None
    if trees:
        layout = layout.apart(trees)
        forest, positions = grow(trees, indptr, positions)
    judged = np.array([span.drafts for span in spans], np.int64)[order] + 1
    logits_at, logits_spans = _judged(indptr, np.where(wants, judged, 0))
    return Batch(
        spans=order,
        rows=rows,
        indptr=indptr,
        ends=ends,
        row_of=row_of,
        tokens=tokens,
        positions=positions,
        angles=image.angles(row_of, positions),
        groups=[layout.group(index, group) for index, group in enumerate(groups)],
        logits_at=logits_at,
        logits_spans=logits_spans,
        drafts=proposed,
        forest=forest,
    )


def _judged(indptr: Ints, count: Ints) -> tuple[Ints, Ints]:
    """The last `count` flattened rows of each span, and the spans they belong to."""
    spans = np.repeat(np.arange(len(count)), count)
    within = np.arange(len(spans)) - np.repeat(_indptr(count)[:-1], count)
    return (indptr[1:] - count)[spans] + within, spans


@dataclass(slots=True)
class _Layout:
    """What the page lists of every group are made of."""

    image: Image
    spec: ModelSpec
    rows: Ints
    start: Ints
    ends: Ints
    indptr: Ints
    row_of: Ints
    positions: Ints
    state: DeviceState | None
    single: bool

    def apart(self, trees: Mapping[int, Draft]) -> "_Layout":
        """The same with a span for every row of the `trees`, by span: all of these end, and see
        what is committed, where the last known token does."""
        nodes = np.zeros(len(self.rows), np.int64)
        nodes[list(trees)] = [len(draft.tokens) for draft in trees.values()]
        spans = np.repeat(np.arange(len(self.rows)), nodes + 1)
        own = _indptr(nodes + 1)[:-1]  # the span of the rows that are known
        ends = (self.ends - nodes)[spans]
        length = np.ones(len(spans), np.int64)
        length[own] = self.ends - nodes - self.start
        return replace(
            self, rows=self.rows[spans], start=ends - length, ends=ends, indptr=_indptr(length)
        )

    def group(self, index: int, group: GroupSpec) -> PagedRows:
        """The page lists of one group: from the first page that a span's first row can see."""
        table, size = self.image.tables[index], self.image.page_size
        _, start = self.image.places(index, self.rows, self.start)
        slots, _ = self.image.places(index, self.row_of, self.positions)
        if group.window is None or (group.sinks and self.state is None):
            first = np.zeros_like(start)  # a list that begins with the sinks
        else:
            first = np.maximum(start - group.window + 1, 0) // size
        if self.state is None:
            page_indptr, pages = self._listed(table, first, start + self.ends - self.start)
        else:  # the tables are there already
            page_indptr, pages = self.rows * self.state.width + first, first[:0]
        return PagedRows(
            indptr=self.indptr,
            start=start,
            page_indptr=page_indptr,
            pages=pages,
            base=first * size,
            slots=table[self.row_of, slots // size].astype(np.int64) * size + slots % size,
            page_size=size,
            scale=self.spec.scale,
            window=group.window,
            sinks=group.sinks,
            softcap=self.spec.attn_softcap,
            table=None if self.state is None else self.state.tables[index],
            shared=self._shared(table, group, start),
        )

    def _shared(self, table: NDArray[np.int32], group: GroupSpec, start: Ints) -> Ints | None:
        if self.state is None or not self.single or group.window is not None:
            return None
        return runs(table, self.rows, start, self.image.page_size)

    def _listed(self, table: NDArray[np.int32], first: Ints, ends: Ints) -> tuple[Ints, Ints]:
        """The pages of all spans one after the other, and where those of each begin."""
        count = -(-ends // self.image.page_size) - first
        page_indptr = _indptr(count)
        column = np.repeat(first - page_indptr[:-1], count) + np.arange(page_indptr[-1])
        return page_indptr, table[np.repeat(self.rows, count), column].astype(np.int64)


def _indptr(lengths: Ints) -> Ints:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out
