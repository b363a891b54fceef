"""Attention over paged KV: `plan` once a step and group, `run` once a layer (FlashInfer's split).

Every cache is a sparse matrix: a span's visible pages are one CSR row of `PagedRows`. Selection,
windows, shared prefixes and remote parts are other index lists and merges of (o, lse), never new
attention code.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, device, dtype

Ints = NDArray[np.int64]


@dataclass(slots=True)
class PagedRows:
    """One step's rows against one KV group, as CSR index lists. S spans, T rows, all arrays int64.

    Row r of span s (rows `indptr[s]` to `indptr[s+1]`) is at position `start[s] + r - indptr[s]`
    and sees the positions up to its own, within `window`. The pages of span s are
    `pages[page_indptr[s]:page_indptr[s+1]]`; the first of them holds position `base[s]` on
    (a multiple of `page_size`; above 0 where a window has left earlier pages behind).
    """

    indptr: Ints  #: [S+1] rows of each span
    start: Ints  #: [S] position of the span's first row
    page_indptr: Ints  #: [S+1] pages of each span
    pages: Ints  #: [nnz] page ids
    base: Ints  #: [S] position of the first slot of the span's first page
    slots: Ints  #: [T] pool slot (page * page_size + offset) that each row's K and V go to
    page_size: int
    scale: float
    window: int | None = None
    softcap: float | None = None


class AttentionPlan(Protocol):
    """The work of one step on one group, laid out; used by every layer of the group."""

    def run(self, cache: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write k, v [T, Hkv, d] to their slots, then attend with q [T, Hq, d] (rope applied).

        `cache` is one layer's entry of what `allocate` returned. Returns o [T, Hq, d] in q's dtype
        and the log-sum-exp [T, Hq] (fp32, natural log), or None for the lse when the plan was made
        with `lse=False`.
        """
        ...


class AttentionBackend(Protocol):
    """A way to attend; parts of kind "attention"."""

    def allocate(
        self,
        n_layers: int,
        n_pages: int,
        page_size: int,
        n_kv_heads: int,
        head_dim: int,
        kind: dtype,
        where: device,
    ) -> list[Any]:
        """KV storage for the layers of one group, in the backend's own layout; an entry a layer."""
        ...

    def plan(self, rows: PagedRows, lse: bool = False) -> AttentionPlan:
        """Lay out one step; host work only, once for all layers of the group."""
        ...

    def copy(self, cache: Any, sources: list[int], targets: list[int]) -> None:
        """Copy whole pages inside one layer's cache (copy-on-write forks)."""
        ...
