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
    #: on a GPU: the flat page tables of all sequences (int32, on the device), which `page_indptr`
    #: ([S] there: the entry of each span's first page) points into instead of `pages`
    table: Tensor | None = None
    #: entries of `table` between the page lists of two KV heads; 0: they have one list
    head_pages: int = 0
    #: [n, 3] disjoint runs of adjacent spans whose first positions are the same pages: first span,
    #: number of spans (2 or more), positions shared from `base` on (a multiple of `page_size`,
    #: none from the start of a span on). Read once for all of them.
    shared: Ints | None = None
    #: first positions that are seen beside the window: page lists reach back to position 0 before
    #: the first of their pages (which `base` is the position of), whatever lies between
    sinks: int = 0


@dataclass(slots=True)
class Rotary:
    """What turns the rows of a fused qkv projection into rotated q and k of one layer."""

    positions: Tensor  #: [T]
    cos: Tensor  #: [max_len, d] fp32
    sin: Tensor  #: [max_len, d] fp32, the first half of each row negated
    n_heads: int
    n_kv_heads: int
    head_dim: int
    q_norm: Tensor | None  #: factors of the RMSNorm of each head before the rotation
    k_norm: Tensor | None
    eps: float


class AttentionPlan(Protocol):
    """The work of one step on one group, laid out; used by every layer of the group."""

    def run(self, cache: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write k, v [T, Hkv, d] to their slots, then attend with q [T, Hq, d] (rope applied).

        `cache` is one layer's entry of what `allocate` returned. Returns o [T, Hq, d] in q's dtype
        and the log-sum-exp [T, Hq] (fp32, natural log), or None for the lse when the plan was made
        with `lse=False`.
        """
        ...


class FusedPlan(AttentionPlan, Protocol):
    """A plan that takes the projection as it is."""

    def fused(self, cache: Any, qkv: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor | None]:
        """Normalise and rotate q and k of qkv [T, (Hq + 2 Hkv) * d], write, attend: as `run`."""
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

    def move(self, cache: Any, sources: Ints, targets: Ints) -> None:
        """Copy single slots inside one layer's cache: all are read, then all are written."""
        ...

    def keys(self, cache: Any, slots: Tensor) -> Tensor:
        """K [n, Hkv, d] of slots [n]."""
        ...

    def read(self, cache: Any, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [n, Hkv, d] of slots [n, Hkv], which may be others for each head."""
        ...

    def write(self, cache: Any, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v [n, Hkv, d] into slots [n]."""
        ...


class GraphPlan(FusedPlan, Protocol):
    """A plan of fixed launches for at most `n_rows` rows, a few in each span, for CUDA graphs.

    What changes from step to step lies in int32 arrays of fixed size on the device. The runner
    owns them: it makes `sizes` before capture, hands the device's through `bind`, and before every
    replay lets `fill` write the host's, which it copies over together with its own inputs.
    """

    sizes: dict[str, int]  #: int32 numbers by name

    def bind(self, arrays: dict[str, Tensor], table: Tensor) -> None:
        """The device arrays, by the names of `sizes`, and the flat page tables."""
        ...

    def fill(self, rows: PagedRows, arrays: dict[str, NDArray[np.int32]]) -> None:
        """Write the work of one step into the host's arrays; every entry, also the idle ones."""
        ...


class GraphBackend(AttentionBackend, Protocol):
    """A backend that can be captured."""

    def graph_plan(
        self, n_rows: int, n_heads: int, n_kv_heads: int, head_dim: int, rows: PagedRows
    ) -> GraphPlan:
        """A plan whose launches fit any step of at most `n_rows` rows with the `graph_key` of
        `rows` (whose page size, scale, window and soft-cap hold for all)."""
        ...

    def graph_fits(self, rows: PagedRows, n_heads: int, n_kv_heads: int, head_dim: int) -> bool:
        """Whether the spans of a step are short enough for such a plan."""
        ...

    def graph_key(
        self, rows: PagedRows, n_heads: int, n_kv_heads: int, head_dim: int
    ) -> tuple[Any, ...]:
        """What the launches depend on beside the number of rows (whether splits are merged, say):
        steps with the same key can share a captured graph."""
        ...
