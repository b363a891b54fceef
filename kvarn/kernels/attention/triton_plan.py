"""Plans of the Triton attention: any mixture of spans in a few launches, and one merge.

A plan only remembers the step; the first layer lays it out as work items (`layout.lay_out`) and
copies them to the device in one transfer that the host does not wait for; every layer of the group
then uses them. A graph plan has its items in arrays of fixed size instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvarn.kernels.attention import PagedRows, Rotary
from kvarn.kernels.attention.layout import Heads, Layout, lay_out
from kvarn.kernels.attention.tilings import Tiling, power_of_two
from kvarn.kernels.upload import upload

TALL = 128  #: rows of the tiles that Hopper's own kernel takes
LOG2E = 1.4426950408889634


@dataclass(slots=True)
class Round:
    """Launches and the merge after them, as int32 arrays on the device; see `tiles`."""

    launches: list[tuple[Tiling, Tensor]]  #: items [n, 8]
    merges: Tensor  #: [m, 3]
    entries: Tensor
    n_slots: int


@dataclass(slots=True)
class OnDevice:
    """A step's work on the device."""

    slots: Tensor  #: [T] where K and V of each row go
    pages: Tensor  #: page ids, flat
    rounds: list[Round]


class TritonPlan:
    """One step on one group; laid out on the device by its first layer."""

    def __init__(self, rows: PagedRows, lse: bool, multiprocessors: int) -> None:
        self.rows = rows
        self.lse = lse
        self.multiprocessors = multiprocessors
        self.there: OnDevice | None = None

    def run(self, cache: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        from kvarn.kernels.triton.kv_write import kv_write

        there = self.ready(q.shape[1], k.shape[1], q.shape[2], q)
        if len(q):
            q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
            heads, dim = k.shape[1:]
            kv_write[(k.shape[0],)](
                k, v, there.slots, cache, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                heads, dim, self.rows.page_size, power_of_two(heads * dim),
            )  # fmt: skip
        return attend_all(self.rows, there, cache, q, self.lse)

    def fused(self, cache: Tensor, qkv: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor | None]:
        """See `FusedPlan`."""
        from kvarn.kernels.triton.rope_write import rope_write

        there = self.ready(rotary.n_heads, rotary.n_kv_heads, rotary.head_dim, qkv)
        q = rope_write(
            qkv, rotary.positions, there.slots, rotary.cos, rotary.sin, cache, rotary.n_heads,
            rotary.n_kv_heads, rotary.q_norm, rotary.k_norm, rotary.eps,
        )  # fmt: skip
        return attend_all(self.rows, there, cache, q, self.lse)

    def ready(self, heads: int, kv_heads: int, dim: int, like: Tensor) -> OnDevice:
        """The step on the device and for the kind of number of `like`."""
        if self.there is None:
            shape = Heads(heads, kv_heads, dim, like.element_size(), self.multiprocessors)
            self.there = self._bring(list(self.rounds(shape)), like.device)
        return self.there

    def rounds(self, heads: Heads) -> Iterable[Layout]:
        """The step's work, laid out on the host."""
        return [lay_out(self.rows, heads)]

    def _bring(self, layouts: list[Layout], device: torch.device) -> OnDevice:
        rows = self.rows
        lists = [rows.slots, rows.pages]
        for layout in layouts:
            lists += [layout.work.merges, layout.work.entries, *layout.work.items]
        slots, pages, *rest = upload(lists, torch.int32, device)
        found = OnDevice(slots, pages if rows.table is None else rows.table, [])
        for layout in layouts:
            (merges, entries), rest = rest[:2], rest[2:]
            launches = list(zip(layout.tilings, rest))
            rest = rest[len(launches) :]
            found.rounds.append(Round(launches, merges, entries, layout.work.n_slots))
        return found


def attend_all(
    rows: PagedRows, there: OnDevice, cache: Tensor, q: Tensor, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Every launch of a step, then the merge: q [T, Hq, d] -> o [T, Hq, d], lse [T, Hq]."""
    from kvarn.kernels.triton.merge import BLOCK_E, WARPS, merge

    (total, heads, dim), device = q.shape, q.device
    o = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty((total, heads), device=device) if want_lse else None
    if not total:
        return o, lse
    for part in there.rounds:
        part_o = torch.empty((part.n_slots, heads, dim), device=device)
        part_lse = torch.empty((part.n_slots, heads), device=device)
        for tiling, items in part.launches:
            _attend(rows, tiling, items, there.pages, cache, q, o, lse, part_o, part_lse)
        if part.n_slots:
            merge[(len(part.merges), heads)](
                part.merges, part.entries, part_o, part_lse, o, lse,
                heads, dim, want_lse, BLOCK_E, power_of_two(dim), num_warps=WARPS,
            )  # fmt: skip
    return o, lse


def _attend(
    rows: PagedRows, tiling: Tiling, items: Tensor, pages: Tensor, cache: Tensor, q: Tensor,
    o: Tensor, lse: Tensor | None, part_o: Tensor, part_lse: Tensor,
) -> None:  # fmt: skip
    """One launch: a program an item and KV head."""
    from kvarn.kernels.triton.attend import attend
    from kvarn.kernels.triton.attend_hopper import attend_chunks, fits

    kv_heads, dim = cache.shape[1], q.shape[2]
    group, block_d = q.shape[1] // kv_heads, max(16, power_of_two(dim))
    if rows.softcap is None:
        scale, cap = rows.scale * LOG2E, 0.0
    else:
        scale, cap = rows.scale / rows.softcap, rows.softcap * LOG2E
    if tiling.block_m == TALL and not rows.sinks and fits(cache, q):
        capped, window = rows.softcap is not None, rows.window or 0
        attend_chunks(
            items, pages, cache, q, o, lse, part_o, part_lse, scale, cap, window, capped
        )  # fmt: skip
        return
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    attend[(len(items) * kv_heads,)](
        q, cache, items, pages, o, lse, part_o, part_lse,
        q.stride(0), q.stride(1), scale, cap,
        kv_heads, group, dim, rows.page_size, rows.head_pages, rows.window or 0,
        rows.softcap is not None, lse is not None, tiling.block_m, tiling.block_n, block_d,
        precision, tiling.stages, rows.sinks, num_warps=tiling.warps,
    )  # fmt: skip
