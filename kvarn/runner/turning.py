"""Positions inside the cache: keys turned before a step (arXiv 2309.17453, section 3.2).

StreamingLLM counts positions inside the cache, so that no distance exceeds what the model was
trained for. Rotations only know distances, and a row of the ring is rotated by its slot. So what
the ring holds moves back by one round, once, when a round begins; and the sinks move along with
every query, whose slot runs through the ring while its place among what is held is the last. No
angle is ever of a position beyond the cache, however long the stream.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvarn.core.model import GroupSpec
from kvarn.kernels.attention import AttentionBackend, Ints
from kvarn.kernels.rope import Rope, turned
from kvarn.kernels.upload import upload
from kvarn.runner.batch import Batch
from kvarn.runner.image import Image
from kvarn.runner.pool import KVPool


@dataclass(slots=True)
class Turning:
    """The sinks of one runner's sequences, as they were computed, and where they are now."""

    backend: AttentionBackend
    pool: KVPool
    image: Image
    ropes: list[Rope]  #: by layer
    sinks: dict[int, int] = field(default_factory=dict)  #: number by image row
    _fresh: set[int] = field(default_factory=set)  # rows whose sinks have never been turned
    #: by group, layer and number of sinks: K and V of every image row, [rows, sinks, Hkv, d] each
    _saved: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def start(self, row: int, sinks: int) -> None:
        """The sequence in `row` has this many."""
        self.sinks[row] = sinks
        self._fresh.add(row)

    def stop(self, row: int) -> None:
        """The sequence in `row` leaves."""
        self.sinks.pop(row, None)
        self._fresh.discard(row)

    def turn(self, batch: Batch) -> None:
        """Before a step: the sinks of each row that is in its ring, up to where its query is."""
        if not self.sinks:
            return
        mine = [i for i, row in enumerate(batch.rows.tolist()) if self.sinks.get(row)]
        for count in {self.sinks[int(batch.rows[i])] for i in mine}:
            some = [i for i in mine if self.sinks[int(batch.rows[i])] == count]
            rows, positions = batch.rows[some], batch.ends[some] - 1
            for index, group in enumerate(self.pool.groups):
                self._turn(index, group, count, rows, positions)
        self._fresh -= {int(batch.rows[i]) for i in mine if self._in_ring(batch, i)}

    def _in_ring(self, batch: Batch, at: int) -> bool:
        row = int(batch.rows[at])
        return bool((batch.ends[at] - 1 >= self.image.rings[:, row, 0]).any())

    def _turn(self, index: int, group: GroupSpec, count: int, rows: Ints, positions: Ints) -> None:
        since, first, length = self.image.rings[index, rows].T
        ring = positions >= since
        if not ring.any():
            return
        nth = positions - since
        rows, nth, first, length = (x[ring] for x in (rows, nth, first, length))
        behind = nth % length - (length - 1)  # of the query's slot, to the last one
        new = np.array([row in self._fresh for row in rows.tolist()])
        where = self._slots(index, rows, np.zeros_like(rows), count)
        device = self.ropes[0].cos.device
        slots, which, shift, fresh = upload(
            [where, rows, behind, np.flatnonzero(new)], torch.int64, device
        )
        by = np.where(nth == 0, first - since[ring], -length)  # from the text, or the last round
        rounds = list[list[Tensor]]()
        begins = nth % length == 0
        for size in set(length[begins].tolist()):
            again = np.flatnonzero(begins & (length == size))
            held = self._slots(index, rows[again], first[again], size)
            rounds.append(upload([held, by[again]], torch.int64, device))
        for layer in group.layers:
            cache, rope = self.pool.by_group[index][layer], self.ropes[layer]
            heads = len(group.heads_of(layer))
            keys, values = self._of(index, layer, count, heads, group.head_dim)
            if len(fresh):
                k, v = self._read(cache, slots[fresh], heads)
                keys[which[fresh]], values[which[fresh]] = k, v
            k = turned(keys[which], rope, shift)
            self.backend.write(cache, slots.flatten(), k.flatten(0, 1), values[which].flatten(0, 1))
            for there, back in rounds:
                k, v = self._read(cache, there, heads)
                k = turned(k, rope, back)
                self.backend.write(cache, there.flatten(), k.flatten(0, 1), v.flatten(0, 1))

    def _slots(self, index: int, rows: Ints, first: Ints, count: int) -> Ints:
        """[n, count] the slots `first` on of each of `rows`."""
        table, size = self.image.tables[index], self.image.page_size
        at = first[:, None] + np.arange(count)
        found: Ints = table[rows[:, None], at // size].astype(np.int64) * size + at % size
        return found

    def _read(self, cache: Any, slots: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """K and V [n, count, heads, d] of slots [n, count]."""
        found = slots.flatten().unsqueeze(1).expand(-1, heads)
        k, v = self.backend.read(cache, found)
        return k.view(*slots.shape, *k.shape[1:]), v.view(*slots.shape, *v.shape[1:])

    def _of(
        self, index: int, layer: int, count: int, heads: int, dim: int
    ) -> tuple[Tensor, Tensor]:
        """Where the sinks of a layer's `heads` in a group are remembered."""
        key = (index, layer, count)
        if key not in self._saved:
            shape = (len(self.image.owner), count, heads, dim)
            device = self.ropes[0].cos.device
            self._saved[key] = (
                torch.zeros(shape, dtype=self.pool.dtype, device=device),
                torch.zeros(shape, dtype=self.pool.dtype, device=device),
            )
        return self._saved[key]
