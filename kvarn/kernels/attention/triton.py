"""Attention on an NVIDIA GPU: any mixture of spans in at most two launches, and merges of splits.

`plan` sorts the spans into decode-like ones (all rows and query heads of a KV head fit into one
small tile) and chunks; the first `run` lays both out as work items and copies them to the device in
one transfer that the host does not wait for; every layer of the group then uses them.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvarn.core.errors import ConfigError
from kvarn.core.part import Cap, Part
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.tiles import Work, work
from kvarn.kernels.upload import upload

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256  #: head_dim
LARGEST_PAGE = 64
DECODE_WAVES, CHUNK_WAVES = 4, 1  #: programs a multiprocessor that splitting aims at
DECODE_LEAST, CHUNK_LEAST = 512, 1024  #: KV positions below which a range is not split further
LOG2E = 1.4426950408889634


@dataclass(slots=True, frozen=True)
class Tiling:
    """The shape of a kernel: rows of a query tile, KV positions a step, warps, stages in flight."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def decode_tiling(dim: int, wide: int, group: int) -> Tiling:
    """For spans that fit into one small tile; `wide` is the size of a number. [bytes]"""
    block_m = max(16, power_of_two(group))
    if wide == 4:
        return Tiling(block_m, 32, 4, 2)
    if dim > 128:
        return Tiling(block_m, 32, 4, 3)
    return Tiling(block_m, 64, 2 if block_m == 16 else 4, 3)


def chunk_tiling(dim: int, wide: int, group: int) -> Tiling:
    """For spans of many rows."""
    least = power_of_two(group)
    if wide == 4:
        return Tiling(max(32, least), 32, 4, 2)
    if dim > 128:
        return Tiling(max(64, least), 32, 4, 2)
    return Tiling(max(128, least), 64, 4, 5 if dim <= 64 else 3)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


@dataclass(slots=True)
class Launch:
    """One launch on the device: its items, and room for the results of split tiles."""

    tiling: Tiling
    work: Work
    items: Tensor
    merges: Tensor
    part_o: Tensor  #: [parts, Hkv, block_m, d], fp32
    part_lse: Tensor  #: [parts, Hkv, block_m], fp32


class TritonPlan:
    """One step on one group; laid out on the device by its first `run`."""

    def __init__(self, rows: PagedRows, lse: bool, multiprocessors: int) -> None:
        self.rows = rows
        self.lse = lse
        self.multiprocessors = multiprocessors
        self.launches: list[Launch] | None = None
        self.slots = self.pages = torch.empty(0, dtype=torch.int32)

    def run(self, cache: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        from kvarn.kernels.triton.kv_write import kv_write

        if self.launches is None:
            self.launches = self.layout(q, k.shape[1])
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], device=q.device) if self.lse else None
        if not q.shape[0]:
            return o, lse
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        heads, dim = k.shape[1:]
        kv_write[(k.shape[0],)](
            k, v, self.slots, cache, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            heads, dim, self.rows.page_size, power_of_two(heads * dim),
        )  # fmt: skip
        for launch in self.launches:
            self._attend(launch, cache, q, o, lse)
        return o, lse

    def layout(self, q: Tensor, kv_heads: int) -> list[Launch]:
        """Sort the spans into launches and bring everything to the device of q [T, Hq, d]."""
        rows, (_, heads, dim) = self.rows, q.shape
        group, wide = heads // kv_heads, q.element_size()
        small, large = decode_tiling(dim, wide, group), chunk_tiling(dim, wide, group)
        lengths = np.diff(rows.indptr)
        height = small.block_m // group
        kinds = (
            (small, (lengths > 0) & (lengths <= height), DECODE_WAVES, DECODE_LEAST),
            (large, lengths > height, CHUNK_WAVES, CHUNK_LEAST),
        )
        plans: list[tuple[Tiling, Work]] = []
        for tiling, mine, waves, least in kinds:
            if mine.any():
                programs = waves * self.multiprocessors
                spans, rows_each = np.flatnonzero(mine), tiling.block_m // group
                plans.append((tiling, work(rows, spans, rows_each, kv_heads, programs, least)))
        arrays = [x for _, found in plans for x in (found.items, found.merges)]
        self.slots, self.pages, *tables = upload(
            [rows.slots, rows.pages, *arrays], torch.int32, q.device
        )
        launches = []
        for i, (tiling, found) in enumerate(plans):
            shape = (found.n_parts, kv_heads, tiling.block_m)
            part_o = torch.empty(*shape, dim, device=q.device)
            part_lse = torch.empty(shape, device=q.device)
            items, merges = tables[2 * i : 2 * i + 2]
            launches.append(Launch(tiling, found, items, merges, part_o, part_lse))
        return launches

    def _attend(self, launch: Launch, cache: Tensor, q: Tensor, o: Tensor, lse: Tensor | None
                ) -> None:  # fmt: skip
        from kvarn.kernels.triton.attend import attend
        from kvarn.kernels.triton.merge import merge

        rows, tiling = self.rows, launch.tiling
        kv_heads, dim = cache.shape[1], q.shape[2]
        group, block_d = q.shape[1] // kv_heads, max(16, power_of_two(dim))
        if rows.softcap is None:
            scale, cap = rows.scale * LOG2E, 0.0
        else:
            scale, cap = rows.scale / rows.softcap, rows.softcap * LOG2E
        precision = "ieee" if q.dtype == torch.float32 else "tf32"
        attend[(len(launch.work.items) * kv_heads,)](
            q, cache, launch.items, self.pages, o, lse, launch.part_o, launch.part_lse,
            q.stride(0), q.stride(1), scale, cap,
            kv_heads, group, dim, rows.page_size, rows.window or 0, rows.softcap is not None,
            lse is not None, tiling.block_m, tiling.block_n, block_d, precision, tiling.stages,
            num_warps=tiling.warps,
        )  # fmt: skip
        if launch.work.n_parts:
            tile = min(16, tiling.block_m)
            merge[(len(launch.work.merges) * kv_heads, tiling.block_m // tile)](
                launch.merges, launch.part_o, launch.part_lse, o, lse,
                kv_heads, group, dim, lse is not None, tiling.block_m, block_d, tile,
            )  # fmt: skip


class TritonAttention(Part):
    """Pages read in place on the GPU; cache [pages, Hkv, 2, page, d], one tensor a layer."""

    name: ClassVar[str] = "triton"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "2501.01005"
    regime: ClassVar[str] = "any batch on an NVIDIA GPU; long prompts alone are faster in cuDNN"
    needs: ClassVar[frozenset[Cap]] = frozenset({Cap.CUDA_DEVICE})

    def __init__(self) -> None:
        try:
            import triton
        except ImportError as error:
            raise ConfigError(
                f"attention 'triton' cannot run: {error}; CUDA builds of torch bring triton along"
            ) from None
        self.interpreted = bool(triton.knobs.runtime.interpret)
        self.multiprocessors = 1

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
        """See `AttentionBackend`; pages of 1 to 64 positions (powers of two), head_dim <= 256."""
        if where.type != "cuda" and not self.interpreted:
            raise ConfigError(f"attention 'triton' runs on device=cuda only, not on {where}")
        if page_size > LARGEST_PAGE or page_size & (page_size - 1):
            raise ConfigError(
                f"attention 'triton' takes a page_size of 1, 2, 4 ... {LARGEST_PAGE}, "
                f"not {page_size}"
            )
        if kind not in DTYPES or head_dim > WIDEST:
            raise ConfigError(
                f"attention 'triton' takes bfloat16, float16 and float32 with a head_dim of at "
                f"most {WIDEST}, not {kind} with {head_dim}"
            )
        if where.type == "cuda":
            properties = torch.cuda.get_device_properties(where)
            self.multiprocessors = properties.multi_processor_count
        shape = (n_pages, n_kv_heads, 2, page_size, head_dim)
        return [torch.zeros(shape, dtype=kind, device=where) for _ in range(n_layers)]

    def plan(self, rows: PagedRows, lse: bool = False) -> TritonPlan:
        """See `AttentionBackend`."""
        return TritonPlan(rows, lse, self.multiprocessors)

    def copy(self, cache: Tensor, sources: list[int], targets: list[int]) -> None:
        """See `AttentionBackend`."""
        lists = [np.array(sources), np.array(targets)]
        here, there = upload(lists, torch.int64, cache.device)
        cache[there] = cache[here]
