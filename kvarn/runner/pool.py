"""The pages' bytes: one pool a group, in the layout of the attention backend. Right side."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.core.model import GroupSpec
from kvarn.core.plan import PageCopy
from kvarn.kernels.attention import AttentionBackend, Ints


class KVPool:
    """KV storage of every layer; `cache[layer]` is what the backend's plans read and write."""

    def __init__(
        self,
        backend: AttentionBackend,
        groups: Sequence[GroupSpec],
        pages: Sequence[int],
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.backend = backend
        self.dtype = dtype
        self.page_size = page_size
        self.groups = list(groups)
        self.pages = list(pages)
        self.cache: dict[int, Any] = {}
        for group, count in zip(groups, pages):
            caches = backend.allocate(
                len(group.layers), count, page_size, group.n_kv_heads, group.head_dim, dtype, device
            )
            self.cache.update(zip(group.layers, caches))

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Carry out page copies, before the forward pass of their step."""
        for index, group in enumerate(self.groups):
            mine = [copy for copy in copies if copy.group == index]
            if mine:
                sources = [copy.source for copy in mine]
                targets = [copy.target for copy in mine]
                for layer in group.layers:
                    self.backend.copy(self.cache[layer], sources, targets)

    @torch.inference_mode()
    def move(
        self, tables: Sequence[NDArray[np.int32]], rows: Ints, sources: Ints, targets: Ints
    ) -> None:
        """Copy the KV of positions `sources` of image rows `rows` [n] to positions `targets`.

        Everything is read before anything is written. `tables`: the page tables by group.
        """
        size = self.page_size
        for table, group in zip(tables, self.groups, strict=True):
            slots = [
                table[rows, at // size].astype(np.int64) * size + at % size
                for at in (sources, targets)
            ]
            for layer in group.layers:
                self.backend.move(self.cache[layer], *slots)
