"""Attention on an NVIDIA GPU by Triton kernels; see `triton_plan` for how a step is carried out."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvarn.core.errors import ConfigError
from kvarn.core.part import Cap, Part
from kvarn.kernels.attention import Ints, PagedRows
from kvarn.kernels.attention.layout import Heads
from kvarn.kernels.attention.selected import SelectedRows
from kvarn.kernels.attention.storage import keys_of_slots, move_slots, read_slots, write_slots
from kvarn.kernels.attention.triton_graph import GraphTritonPlan, Key, fits, key_of
from kvarn.kernels.attention.triton_plan import TritonPlan
from kvarn.kernels.attention.triton_selected import (
    GraphSelectedPlan,
    TritonSelectedPlan,
    room,
)
from kvarn.kernels.upload import upload

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
WIDEST = 256  #: head_dim
LARGEST_PAGE = 64


class TritonAttention(Part):
    """Pages read in place on the GPU; cache [pages, Hkv, 2, page, d], one tensor a layer."""

    name: ClassVar[str] = "triton"
    kind: ClassVar[str] = "attention"
    paper: ClassVar[str] = "2501.01005"
    regime: ClassVar[str] = "any batch on an NVIDIA GPU; long prompts alone are faster in cuDNN"
    needs: ClassVar[frozenset[Cap]] = frozenset({Cap.CUDA_DEVICE})
    gives: ClassVar[frozenset[Cap]] = frozenset({Cap.CAPTURE})

    def __init__(self) -> None:
        try:
            import triton
        except ImportError as error:
            raise ConfigError(
                f"attention 'triton' cannot run: {error}; CUDA builds of torch bring triton along"
            ) from None
        self.interpreted = bool(triton.knobs.runtime.interpret)
        self.multiprocessors = 1
        self.wide = 2  #: bytes of a number of q in captured steps

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
                f"attention 'triton' takes bfloat16, float16, float32 and float8_e4m3fn with a "
                f"head_dim of at most {WIDEST}, not {kind} with {head_dim}"
            )
        self.wide = 4 if kind == torch.float32 else 2
        if where.type == "cuda":
            properties = torch.cuda.get_device_properties(where)
            self.multiprocessors = properties.multi_processor_count
        shape = (n_pages, n_kv_heads, 2, page_size, head_dim)
        return [torch.zeros(shape, dtype=kind, device=where) for _ in range(n_layers)]

    def plan(self, rows: PagedRows, lse: bool = False) -> TritonPlan:
        """See `AttentionBackend`."""
        return TritonPlan(rows, lse, self.multiprocessors)

    def selected(self, rows: SelectedRows) -> TritonSelectedPlan:
        """See `SelectBackend`."""
        return TritonSelectedPlan(rows, self.multiprocessors)

    def selected_graph_plan(
        self, n_rows: int, n_heads: int, kv_heads: int, head_dim: int, rows: SelectedRows
    ) -> GraphSelectedPlan:
        """See `SelectBackend`."""
        return GraphSelectedPlan(rows, n_rows, self._heads(n_heads, kv_heads, head_dim))

    def selected_key(
        self, rows: SelectedRows, n_heads: int, kv_heads: int, head_dim: int
    ) -> tuple[int, int, bool, Key]:
        """See `SelectBackend`."""
        heads = self._heads(n_heads, kv_heads, head_dim)
        listed = key_of(rows.listed(kv_heads, rows.places, None), heads)
        return room(rows), rows.most, bool(rows.anew.any()), listed

    def graph_plan(
        self, n_rows: int, n_heads: int, n_kv_heads: int, head_dim: int, rows: PagedRows
    ) -> GraphTritonPlan:
        """See `GraphBackend`."""
        return GraphTritonPlan(rows, n_rows, self._heads(n_heads, n_kv_heads, head_dim))

    def graph_key(self, rows: PagedRows, n_heads: int, n_kv_heads: int, head_dim: int) -> Key:
        """See `GraphBackend`."""
        return key_of(rows, self._heads(n_heads, n_kv_heads, head_dim))

    def graph_fits(self, rows: PagedRows, n_heads: int, n_kv_heads: int, head_dim: int) -> bool:
        """See `GraphBackend`."""
        return fits(rows, self._heads(n_heads, n_kv_heads, head_dim))

    def _heads(self, n_heads: int, n_kv_heads: int, head_dim: int) -> Heads:
        return Heads(n_heads, n_kv_heads, head_dim, self.wide, self.multiprocessors)

    def copy(self, cache: Tensor, sources: list[int], targets: list[int]) -> None:
        """See `AttentionBackend`."""
        lists = [np.array(sources), np.array(targets)]
        here, there = upload(lists, torch.int64, cache.device)
        cache[there] = cache[here]

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
