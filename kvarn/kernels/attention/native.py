"""Attention by the compiled kernel: paged, no gathering, every span in one call."""

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kvarn.core.errors import ConfigError
from kvarn.core.part import Cap, Part
from kvarn.kernels import native
from kvarn.kernels.attention import Ints, PagedRows
from kvarn.kernels.attention.storage import (
    keys_of_slots,
    move_slots,
    read_slots,
    write_slots,
    zeros,
)

BLOCK = 96  #: rows of one item of work, the query heads of a KV head counted as rows

SIZES = ("spans", "rows", "heads", "kv_heads", "dim", "page_size")
ARRAYS = ("indptr", "start", "page_indptr", "pages", "base", "slots")


class Step(ctypes.Structure):
    """`Step` of attention.cpp."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_void_p) for name in ARRAYS),
        ("window", ctypes.c_int64),
        ("sinks", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("items", ctypes.c_int64),
        ("work", ctypes.c_void_p),
    ]


@dataclass(slots=True)
class NativePlan:
    """One step as the kernel reads it; `keep` holds the arrays that `step` points into."""

    rows: PagedRows
    lse: bool
    step: Step
    address: int
    kernels: dict[torch.dtype, Any]
    keep: list[Ints]

    def run(self, cache: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        t, heads, dim = q.shape
        self.lay_out(heads, k.shape[1], dim)
        q, k, v = _packed_heads(q), _packed_heads(k), _packed_heads(v)
        o = torch.empty((t, heads, dim), dtype=q.dtype)
        lse = torch.empty((t, heads), dtype=torch.float32) if self.lse else None
        self.kernels[q.dtype](
            self.address, cache.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(),
            q.stride(0), k.stride(0), v.stride(0), o.data_ptr(),
            None if lse is None else lse.data_ptr(),
        )  # fmt: skip
        return o, lse

    def lay_out(self, heads: int, kv_heads: int, dim: int) -> None:
        """Split the spans into blocks of rows, the longest work first; once a step."""
        step = self.step
        if step.heads == heads:
            return
        step.heads, step.kv_heads, step.dim = heads, kv_heads, dim
        work = blocks(self.rows, max(1, BLOCK // (heads // kv_heads)))
        self.keep.append(work)
        step.items, step.work = len(work), work.ctypes.data


def blocks(rows: PagedRows, height: int) -> Ints:
    """Items [n, 3] of (span, first row, rows), at most `height` rows each, most KV first."""
    lengths = np.diff(rows.indptr)
    counts = -(-lengths // height)
    span = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = rows.indptr[span] + nth * height
    size = np.minimum(height, rows.indptr[span + 1] - first)
    cost = (rows.start[span] + nth * height) * size
    order = np.argsort(-cost, kind="stable")
    return np.ascontiguousarray(np.stack((span, first, size), 1)[order])


def _packed_heads(x: Tensor) -> Tensor:
    """x [T, H, d] with its heads side by side in a row; copied only where they are not."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


class NativeAttention(Part):
    """One compiled call a layer; cache [pages, Hkv, 2, page, d], one tensor a layer."""

    name: ClassVar[str] = "native"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "2501.01005"
    regime: ClassVar[str] = "any batch on a CPU with a C++ compiler; bitwise the same in any batch"
    needs: ClassVar[frozenset[Cap]] = frozenset({Cap.CPU_DEVICE})
    gives: ClassVar[frozenset[Cap]] = frozenset({Cap.BATCH_INVARIANT})

    def __init__(self) -> None:
        library = native.library()
        if library is None:
            raise ConfigError(
                f"attention 'native' cannot run: {native.reason()}; attention=cpu needs no compiler"
            )
        self.kernels = library.functions["attention"]

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
        """See `AttentionBackend`; the CPU, float32 or bfloat16 with an even head_dim."""
        if where.type != "cpu" or kind not in native.SUFFIXES:
            raise ConfigError(
                f"attention 'native' takes float32 and bfloat16 on the CPU, not {kind} on {where}"
            )
        if kind == torch.bfloat16 and head_dim % 2:
            raise ConfigError(f"attention 'native' takes an even head_dim in bf16, not {head_dim}")
        shape = (n_pages, n_kv_heads, 2, page_size, head_dim)
        return [zeros(shape, kind, where) for _ in range(n_layers)]

    def plan(self, rows: PagedRows, lse: bool = False) -> NativePlan:
        """See `AttentionBackend`."""
        arrays = [np.ascontiguousarray(getattr(rows, name), np.int64) for name in ARRAYS]
        step = Step(
            len(rows.start), len(rows.slots), 0, 0, 0, rows.page_size,
            *(x.ctypes.data for x in arrays),
            rows.window or 0, rows.sinks, rows.scale, rows.softcap or 0.0, 0, None,
        )  # fmt: skip
        return NativePlan(rows, lse, step, ctypes.addressof(step), self.kernels, arrays)

    def copy(self, cache: Tensor, sources: list[int], targets: list[int]) -> None:
        """See `AttentionBackend`."""
        cache[targets] = cache[sources]

    def move(self, cache: Tensor, sources: Ints, targets: Ints) -> None:
        """See `AttentionBackend`."""
        move_slots(cache, sources, targets)

    def keys(self, cache: Tensor, slots: Tensor) -> Tensor:
        """See `AttentionBackend`."""
        return keys_of_slots(cache, slots)

    def read(self, cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See `AttentionBackend`."""
        return read_slots(cache, slots)

    def write(self, cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """See `AttentionBackend`."""
        write_slots(cache, slots, k, v)
