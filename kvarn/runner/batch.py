"""From spans to arrays: the rows of a step, flattened, and their page lists by group."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.core.model import GroupSpec, ModelSpec
from kvarn.core.plan import Span
from kvarn.kernels.attention import PagedRows
from kvarn.runner.image import Image

Ints = NDArray[np.int64]


@dataclass(slots=True)
class Batch:
    """One step's T rows in S spans, on the host."""

    rows: Ints  #: [S] image row of each span
    indptr: Ints  #: [S+1] first flattened row of each span
    ends: Ints  #: [S] position after each span's last
    tokens: Ints  #: [T]
    positions: Ints  #: [T]
    groups: list[PagedRows]
    logits_at: Ints  #: flattened rows whose logits choose a token, in span order
    logits_spans: Ints  #: the spans they belong to


def build(spans: list[Span], image: Image, spec: ModelSpec, groups: list[GroupSpec]) -> Batch:
    """Lay out a step. A handful of numpy calls, whatever the number of spans."""
    rows = image.rows([span.seq for span in spans])
    start = np.array([span.start for span in spans], np.int64)
    length = np.array([span.length for span in spans], np.int64)
    wants = np.array([span.wants_logits for span in spans], np.bool_)
    indptr = _indptr(length)
    if len(spans) == indptr[-1]:  # decode only: one row a span
        row_of, positions = rows, start
    else:
        row_of = np.repeat(rows, length)
        positions = np.repeat(start - indptr[:-1], length) + np.arange(indptr[-1])
    ends = start + length
    logits_spans = np.flatnonzero(wants)
    return Batch(
        rows=rows,
        indptr=indptr,
        ends=ends,
        tokens=image.tokens[row_of, positions].astype(np.int64),
        positions=positions,
        groups=[
            _paged(
                group, table, image.page_size, spec, rows, start, ends, indptr, row_of, positions
            )
            for group, table in zip(groups, image.tables)
        ],
        logits_at=indptr[1:][logits_spans] - 1,
        logits_spans=logits_spans,
    )


def _paged(
    group: GroupSpec,
    table: NDArray[np.int32],
    page_size: int,
    spec: ModelSpec,
    rows: Ints,
    start: Ints,
    ends: Ints,
    indptr: Ints,
    row_of: Ints,
    positions: Ints,
) -> PagedRows:
    """The page lists of one group: from the first page that a span's first row can see."""
    if group.window is None:
        first = np.zeros_like(start)
    else:
        first = np.maximum(start - group.window + 1, 0) // page_size
    count = -(-ends // page_size) - first
    page_indptr = _indptr(count)
    column = np.repeat(first - page_indptr[:-1], count) + np.arange(page_indptr[-1])
    return PagedRows(
        indptr=indptr,
        start=start,
        page_indptr=page_indptr,
        pages=table[np.repeat(rows, count), column].astype(np.int64),
        base=first * page_size,
        slots=table[row_of, positions // page_size].astype(np.int64) * page_size
        + positions % page_size,
        page_size=page_size,
        scale=spec.scale,
        window=group.window,
        softcap=spec.attn_softcap,
    )


def _indptr(lengths: Ints) -> Ints:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out
