"""The pages' bytes: one pool a group, in the layout of the attention backend. Right side."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.core.model import GroupSpec, shares_of
from kvarn.core.plan import PageCopy
from kvarn.kernels.attention import AttentionBackend, Ints


class KVPool:
    """KV storage of every layer; `cache[layer]` is what the layer's plan reads and writes.

    Where the KV heads of a layer lie in several groups, that is one storage for each of these.
    """

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
        self.by_group: list[dict[int, Any]] = []  #: the storage of each group's layers
        for group, count in zip(groups, pages):
            mine: dict[int, Any] = {}
            for layer in group.layers:
                heads = len(group.heads_of(layer))
                mine[layer] = backend.allocate(
                    1, count, page_size, heads, group.head_dim, dtype, device
                )[0]
            self.by_group.append(mine)
        self.cache: dict[int, Any] = {}
        for layer, owners in shares_of(groups).items():
            caches = [self.by_group[index][layer] for index in owners]
            self.cache[layer] = caches[0] if len(caches) == 1 else tuple(caches)

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Carry out page copies, before the forward pass of their step."""
        for index, caches in enumerate(self.by_group):
            mine = [copy for copy in copies if copy.group == index]
            if mine:
                sources = [copy.source for copy in mine]
                targets = [copy.target for copy in mine]
                for cache in caches.values():
                    self.backend.copy(cache, sources, targets)

    @torch.inference_mode()
    def move(
        self, tables: Sequence[NDArray[np.int32]], rows: Ints, sources: Ints, targets: Ints
    ) -> None:
        """Copy the KV of positions `sources` of image rows `rows` [n] to positions `targets`.

        Everything is read before anything is written. `tables`: the page tables by group.
        """
        size = self.page_size
        for table, caches in zip(tables, self.by_group, strict=True):
            slots = [
                table[rows, at // size].astype(np.int64) * size + at % size
                for at in (sources, targets)
            ]
            for cache in caches.values():
                self.backend.move(cache, *slots)
