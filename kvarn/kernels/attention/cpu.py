"""Attention on the CPU with torch's own kernels, over any mixture of spans.

`plan` sorts the spans into pieces and lays out slots and masks; `run` does a few calls a piece:
fresh prompts attend to their own k and v without reading the cache; decode rows of like length are
gathered into one padded batch; a chunk with earlier context gathers its pages once and goes through
in blocks of rows, so that what is above the diagonal is not computed.
The query heads of a KV head are folded into the rows: K and V are never repeated.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvarn.core.part import Cap, Part
from kvarn.kernels.attention import Ints, PagedRows
from kvarn.kernels.attention.reference import attend, inside
from kvarn.kernels.attention.storage import zeros

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BLOCK = 128  #: rows of a chunk that go through together
SPREAD = 1.5  #: a decode batch holds lengths up to this many times its shortest


@dataclass(slots=True)
class Decode:
    """One-row spans of like length: rows [B], slots [B * L], bias [B, 1, 1, L]."""

    rows: Tensor
    slots: Tensor
    length: int
    bias: Tensor
    whole: bool  #: rows are all rows of the step, in order

    def run(self, plan: "CPUPlan", flat: Tensor, q: Tensor, k: Tensor, v: Tensor,
            o: Tensor, lse: Tensor) -> None:  # fmt: skip
        """Gather, then one call over [B, Hkv, group, d]."""
        mine = q if self.whole else q.index_select(0, self.rows)
        n, heads, dim = mine.shape
        seen = flat.index_select(0, self.slots).view(n, self.length, 2, -1, dim)
        keys, values = seen[:, :, 0].transpose(1, 2), seen[:, :, 1].transpose(1, 2)
        folded = mine.view(n, keys.shape[1], -1, dim)
        out, sums = flash(
            folded, keys, values, attn_mask=self.bias.to(q.dtype), scale=plan.rows.scale
        )
        o[self.rows] = out.reshape(n, heads, dim)
        lse[self.rows] = sums.reshape(n, heads)


@dataclass(slots=True)
class Fresh:
    """A span from position 0: its KV is in this step's rows, no cache is read."""

    lo: int
    hi: int

    def run(self, plan: "CPUPlan", flat: Tensor, q: Tensor, k: Tensor, v: Tensor,
            o: Tensor, lse: Tensor) -> None:  # fmt: skip
        """Blocks of rows over all that lies before them."""
        blocks(plan, self.lo, self.hi, 0, k[self.lo : self.hi], v[self.lo : self.hi], q, o, lse)


@dataclass(slots=True)
class Chunk:
    """A span with earlier context, or with a window: its pages are gathered once."""

    lo: int
    hi: int
    start: int  #: position of the first row, counted from the first slot
    slots: Tensor

    def run(self, plan: "CPUPlan", flat: Tensor, q: Tensor, k: Tensor, v: Tensor,
            o: Tensor, lse: Tensor) -> None:  # fmt: skip
        """Blocks of rows over the gathered pages."""
        seen = flat.index_select(0, self.slots)
        blocks(plan, self.lo, self.hi, self.start, seen[:, 0], seen[:, 1], q, o, lse)


def blocks(
    plan: "CPUPlan", lo: int, hi: int, start: int, keys: Tensor, values: Tensor, q: Tensor,
    o: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Rows lo .. hi, the first at index `start` of keys and values [L, Hkv, d], block by block."""
    scale, window = plan.rows.scale, plan.rows.window
    heads, (kv_heads, dim) = q.shape[1], keys.shape[1:]
    group = heads // kv_heads
    keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    for first in range(lo, hi, BLOCK):
        n = min(BLOCK, hi - first)
        at = start + first - lo
        low = 0 if window is None else max(0, at - window + 1)
        bias = plan.bias(n, at - low, n + at - low, q.dtype).unsqueeze(1).expand(-1, group, -1)
        mine = q[first : first + n].view(n, kv_heads, group, dim).transpose(0, 1)
        out, sums = flash(
            mine.reshape(1, kv_heads, n * group, dim),
            keys[:, :, low : at + n], values[:, :, low : at + n],
            attn_mask=bias.reshape(1, 1, n * group, -1), scale=scale,
        )  # fmt: skip
        o[first : first + n] = out.view(kv_heads, n, group, dim).transpose(0, 1).flatten(1, 2)
        lse[first : first + n] = sums.view(kv_heads, n, group).transpose(0, 1).flatten(1, 2)


@dataclass(slots=True)
class Masked:
    """Any span with a soft-cap or sinks, which torch's kernel has not: dense, in fp32."""

    lo: int
    hi: int
    slots: Tensor
    mask: Tensor

    def run(self, plan: "CPUPlan", flat: Tensor, q: Tensor, k: Tensor, v: Tensor,
            o: Tensor, lse: Tensor) -> None:  # fmt: skip
        """One dense call."""
        seen = flat.index_select(0, self.slots)
        rows = slice(self.lo, self.hi)
        out, lse[rows] = attend(
            q[rows], seen[:, 0], seen[:, 1], self.mask, plan.rows.scale, plan.rows.softcap
        )
        o[rows] = out.to(o.dtype)


class CPUPlan:
    """The pieces of one step."""

    def __init__(self, rows: PagedRows, lse: bool, pieces: "list[Piece]") -> None:
        self.rows = rows
        self.lse = lse
        self.pieces = pieces
        self.slots = torch.from_numpy(rows.slots)
        self._biases: dict[tuple[int, int], Tensor] = {}

    def run(self, cache: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        flat = cache.flatten(0, 1)
        flat.index_copy_(0, self.slots, torch.stack((k, v), 1))
        q = q.contiguous()
        o = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        for piece in self.pieces:
            piece.run(self, flat, q, k, v, o, lse)
        return o, lse if self.lse else None

    def bias(self, n: int, at: int, length: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [n, length] of rows at index `at` on; made once, used by every layer."""
        key = (n, at)
        if key not in self._biases:
            position = torch.arange(at, at + n).unsqueeze(1)
            index = torch.arange(length)
            hidden = index > position
            if self.rows.window is not None:
                hidden |= index <= position - self.rows.window
            self._biases[key] = torch.zeros(n, length, dtype=dtype).masked_fill_(hidden, -math.inf)
        return self._biases[key]


Piece = Decode | Fresh | Chunk | Masked


def slots_of(rows: PagedRows, s: int, low: int, end: int) -> Ints:
    """Slots of positions low .. end of span `s`."""
    at = np.arange(low - int(rows.base[s]), end - int(rows.base[s]))
    pages = rows.pages[rows.page_indptr[s] : rows.page_indptr[s + 1]]
    slots: Ints = pages[at // rows.page_size] * rows.page_size + at % rows.page_size
    return slots


def lowest(rows: PagedRows, start: int) -> int:
    """First position that a row at `start` sees."""
    return 0 if rows.window is None else max(0, start - rows.window + 1)


def pieces_of(rows: PagedRows) -> list[Piece]:
    """Sort the spans into pieces."""
    pieces: list[Piece] = []
    single: list[int] = []
    for s in range(len(rows.start)):
        lo, hi, start = int(rows.indptr[s]), int(rows.indptr[s + 1]), int(rows.start[s])
        low = lowest(rows, start)
        if hi == lo:
            continue
        if rows.softcap is not None or rows.sinks:
            pieces.append(_masked(rows, s, lo, hi, start, low))
        elif hi - lo == 1:
            single.append(s)
        elif start == 0:
            pieces.append(Fresh(lo, hi))
        else:
            slots = torch.from_numpy(slots_of(rows, s, low, start + hi - lo))
            pieces.append(Chunk(lo, hi, start - low, slots))
    return pieces + _decodes(rows, single)


def _masked(rows: PagedRows, s: int, lo: int, hi: int, start: int, low: int) -> Masked:
    end, sinks = start + hi - lo, min(rows.sinks, low)
    at = torch.arange(start, end).unsqueeze(1)
    position = torch.cat([torch.arange(sinks), torch.arange(low, end)])
    mask = position <= at
    if rows.window is not None:
        mask &= inside(rows, position, at)
    slots = np.concatenate([slots_of(rows, s, 0, sinks), slots_of(rows, s, low, end)])
    return Masked(lo, hi, torch.from_numpy(slots), mask)


def _decodes(rows: PagedRows, spans: list[int]) -> list[Piece]:
    """One-row spans in batches of like length, padded with slot 0 behind a mask."""
    lengths = {s: int(rows.start[s]) + 1 - lowest(rows, int(rows.start[s])) for s in spans}
    spans = sorted(spans, key=lengths.__getitem__)
    pieces: list[Piece] = []
    while spans:
        most = max(int(lengths[spans[0]] * SPREAD), lengths[spans[0]] + 64)
        batch = sorted(s for s in spans if lengths[s] <= most)
        spans = [s for s in spans if lengths[s] > most]
        longest = max(lengths[s] for s in batch)
        slots = np.zeros((len(batch), longest), np.int64)
        bias = torch.zeros(len(batch), 1, 1, longest)
        for i, s in enumerate(batch):
            end = int(rows.start[s]) + 1
            slots[i, : lengths[s]] = slots_of(rows, s, end - lengths[s], end)
            slots[i, lengths[s] :] = slots[i, 0]
            bias[i, ..., lengths[s] :] = -math.inf
        at = rows.indptr[batch]
        whole = len(at) == int(rows.indptr[-1])
        pieces.append(
            Decode(torch.from_numpy(at), torch.from_numpy(slots.ravel()), longest, bias, whole)
        )
    return pieces


class CPUAttention(Part):
    """torch's kernels over gathered pages; cache [pages, page, 2, Hkv, d], one tensor a layer."""

    name: ClassVar[str] = "cpu"
    kind: ClassVar[str] = "attention"
    regime: ClassVar[str] = "any CPU, any batch; attention=native is faster where it can be built"
    needs: ClassVar[frozenset[Cap]] = frozenset({Cap.CPU_DEVICE})

    def allocate(
        self,
        n_layers: int,
        n_pages: int,
        page_size: int,
        n_kv_heads: int,
        head_dim: int,
        kind: torch.dtype,
        where: torch.device,
    ) -> list[Tensor]:
        """See `AttentionBackend`."""
        shape = (n_pages, page_size, 2, n_kv_heads, head_dim)
        return [zeros(shape, kind, where) for _ in range(n_layers)]

    def plan(self, rows: PagedRows, lse: bool = False) -> CPUPlan:
        """See `AttentionBackend`."""
        return CPUPlan(rows, lse, pieces_of(rows))

    def copy(self, cache: Tensor, sources: list[int], targets: list[int]) -> None:
        """See `AttentionBackend`."""
        cache[targets] = cache[sources]

    def move(self, cache: Tensor, sources: Ints, targets: Ints) -> None:
        """See `AttentionBackend`."""
        flat = cache.flatten(0, 1)
        flat[targets] = flat[sources]

    def keys(self, cache: Tensor, slots: Tensor) -> Tensor:
        """See `AttentionBackend`."""
        return cache.flatten(0, 1)[slots, 0]

    def read(self, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend`."""
        flat, heads = cache.flatten(0, 1), torch.arange(cache.shape[3])
        return flat[slots, 0, heads], flat[slots, 1, heads]

    def write(self, cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """See `AttentionBackend`."""
        flat = cache.flatten(0, 1)
        flat[slots, 0], flat[slots, 1] = k.to(cache.dtype), v.to(cache.dtype)
