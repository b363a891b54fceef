"""Sequences whose rows choose what they see: their bounds, and the plans of their steps.

A page's bounds are made when it is whole, by whoever selects from it. A sequence starts without
any: its first step makes those of the pages that it found in the prefix cache or forked from, and
of every page after a preemption. That reads each key once, as one step of dense attention would,
and bounds need not be copied when pages are.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvarn.core.keep import ENDLESS
from kvarn.core.plan import SeqStart
from kvarn.kernels.attention import AttentionBackend, Ints
from kvarn.kernels.attention.selected import GatheringPlan, LayerPlan, SelectedRows
from kvarn.runner.batch import Batch
from kvarn.runner.image import Image
from kvarn.runner.pool import KVPool
from kvarn.runner.state import DeviceState
from kvarn.sparse.part import Pages, Selector
from kvarn.sparse.rules import Rules


@dataclass(slots=True)
class SelectingStep:
    """The plans of one step, by layer; None where a layer sees all."""

    plans: list[LayerPlan | None]
    fused: bool  #: whether all of them take the projection as it is


class Selecting:
    """The sequences of one runner that see some of their pages."""

    def __init__(
        self, rules: Rules, backend: AttentionBackend, pool: KVPool, image: Image,
        state: DeviceState | None, device: torch.device,
    ) -> None:  # fmt: skip
        self.rules, self.backend, self.image = rules, backend, image
        self.state, self.device = state, device
        self.parts: dict[int, Selector] = {}  #: by image row
        n_rows = len(image.owner)
        self.since = np.full(n_rows, ENDLESS, np.int64)  #: first position that chooses
        self.keep = np.zeros(n_rows, np.int64)  #: pages that each row sees
        self.dense = np.zeros(n_rows, np.int64)  #: first layers that see all
        self.sketched = np.zeros(n_rows, np.int64)  #: leading pages that have bounds
        #: bounds of every page, by layer: [pages, Hkv, 2, d]
        self.sketches: dict[int, Tensor] = {}
        for group, count in zip(pool.groups, pool.pages):
            if group.sketched:
                shape = (count, group.n_kv_heads, 2, group.head_dim)
                for layer in group.layers:
                    self.sketches[layer] = torch.zeros(shape, dtype=pool.dtype, device=device)
        self.groups = [g if group.sketched else None for g, group in enumerate(pool.groups)]
        self.group_of = {layer: g for g, group in enumerate(pool.groups) for layer in group.layers}

    def start(self, row: int, start: SeqStart) -> None:
        """The sequence in `row`, if it chooses."""
        part, rule = self.rules.part(start.request), self.rules.selects(start.request)
        if not isinstance(part, Selector) or rule is None:
            return
        self.parts[row] = part
        self.since[row] = rule.since(start.prompt_len)
        self.keep[row], self.dense[row] = rule.pages, part.dense
        self.sketched[row] = 0

    def stop(self, row: int) -> None:
        """The sequence in `row` leaves."""
        if self.parts.pop(row, None) is not None:
            self.since[row] = ENDLESS

    def step(self, batch: Batch) -> SelectingStep | None:
        """What this step's layers do; None where nobody chooses, almost always."""
        if not self.parts:
            return None
        mine = np.array([row in self.parts for row in batch.rows.tolist()], np.bool_)
        if not mine.any():
            return None
        chooses = np.flatnonzero(batch.positions >= self.since[batch.row_of])
        whole = self._whole(batch, mine)
        made = _Plans(self, batch, whole)
        dense = self.dense[batch.rows[mine]]
        plans: list[LayerPlan | None] = []
        for layer in sorted(self.group_of):
            group = self.group_of[layer]
            if self.groups[group] is None or layer < dense.min():
                plans.append(None)
                continue
            rows = chooses[self.dense[batch.row_of[chooses]] <= layer]
            plan, owners = made.of(group, rows)
            choose = partial(self._choose, layer, owners, batch.positions[rows])
            plans.append(LayerPlan(plan, self.sketches[layer], choose))
        drafted = np.array([len(d.tokens) if d else 0 for d in batch.drafts] or [0], np.int64)
        ends = batch.ends - drafted
        self.sketched[batch.rows[mine]] = ends[mine] // self.image.page_size
        return SelectingStep(plans, made.fused)

    def _whole(self, batch: Batch, mine: Any) -> list[Ints]:
        """Pages without bounds that are whole after this step, by group."""
        rows, size = batch.rows[mine], self.image.page_size
        start = batch.ends[mine] - np.diff(batch.indptr)[mine]
        first = np.minimum(self.sketched[rows], start // size)  # a step may be planned once more
        count = batch.ends[mine] // size - first
        which = np.repeat(rows, count)
        nth = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count - first, count)
        return [table[which, nth].astype(np.int64) for table in self.image.tables]

    def _choose(
        self, layer: int, parts: list[Selector], positions: Ints, i: int,
        q: Tensor, low: Tensor, high: Tensor,
    ) -> Tensor:  # fmt: skip
        """Scores [Hkv, P] of the pages of row `i`."""
        return parts[i].select(Pages(q, low, high, layer, int(positions[i])))


@dataclass(slots=True)
class _Plans:
    """The plans of one step by group and number of choosing rows, each made once."""

    selecting: Selecting
    batch: Batch
    whole: list[Ints]
    fused: bool = True
    made: dict[tuple[int, int], tuple[Any, list[Selector]]] = field(default_factory=dict)

    def of(self, group: int, rows: Ints) -> tuple[Any, list[Selector]]:
        """A plan in which the flattened `rows` choose, and whose parts they follow.

        Rows only join from one layer to the next, so their number says which they are.
        """
        key = (group, len(rows))
        if key not in self.made:
            self.made[key] = self._make(group, rows)
        return self.made[key]

    def _make(self, group: int, rows: Ints) -> tuple[Any, list[Selector]]:
        this, batch = self.selecting, self.batch
        owners = batch.row_of[rows]
        parts = [this.parts[row] for row in owners.tolist()]
        size, at = this.image.page_size, batch.positions[rows]
        others = np.ones(len(batch.positions), np.bool_)
        others[rows] = False
        chosen = SelectedRows(
            batch.groups[group], rows, np.flatnonzero(others), at // size + 1, at % size + 1,
            this.keep[owners], this.image.tables[group], owners, self.whole[group],
        )  # fmt: skip
        backend: Any = this.backend
        if this.state is not None and all(part.bounds for part in parts):
            return backend.selected(chosen, owners * this.state.width), parts
        self.fused = False
        return GatheringPlan(this.backend, chosen, this.device), parts
