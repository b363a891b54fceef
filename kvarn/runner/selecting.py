"""Sequences whose rows choose what they see: their bounds, and the plans of their steps.

A page's bounds are made when it is whole, by whoever selects from it. A sequence starts without
any: its first step makes those of the pages that it found in the prefix cache or forked from, and
of every page after a preemption. That reads each key once, as one step of dense attention would,
and bounds need not be copied when pages are.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.core.keep import ENDLESS
from kvarn.core.plan import SeqStart
from kvarn.kernels.attention import AttentionBackend, Ints
from kvarn.kernels.attention.selected import Book, GatheringPlan, LayerPlan, SelectedRows
from kvarn.kernels.upload import upload
from kvarn.runner.batch import Batch
from kvarn.runner.image import Image
from kvarn.runner.pool import KVPool
from kvarn.runner.state import DeviceState
from kvarn.sparse.part import Pages, Selector
from kvarn.sparse.rules import Rules


@dataclass(slots=True)
class Choice:
    """A step of single rows that all choose by the bounds, or have, in the same layers: it can be
    replayed.

    A row that has no more pages than it may see chooses all of them.
    """

    rows: dict[int, SelectedRows]  #: by group
    dense: int  #: first layers that see all
    books: dict[int, Book]  #: by layer

    def idle(self) -> "Choice":
        """The same step without rows."""
        return replace(self, rows={group: rows.idle() for group, rows in self.rows.items()})


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
        self.reuse = np.ones(n_rows, np.int64)  #: rows of a page that share a choice
        self.odd = np.zeros(n_rows, np.bool_)  #: chooses by something else than the bounds
        self.sketched = np.zeros(n_rows, np.int64)  #: leading pages that have bounds
        own = rules.lists
        self.most = 0 if own is None else own.budget // image.page_size  #: of a remembered list
        self.depth = 1 if own is None else choices(rules.drafts, own.reuse, image.page_size)
        self.books: dict[int, Book] = {}  #: by layer
        for group, count in zip(pool.groups, pool.pages):
            for layer in group.layers if group.sketched else ():
                shape = (count, group.n_kv_heads, 2, group.head_dim)
                sketch = torch.zeros(shape, dtype=pool.dtype, device=device)
                memory = None
                if own is not None:
                    lists = (n_rows * self.depth, group.n_kv_heads, self.most)
                    memory = torch.zeros(lists, dtype=torch.int32, device=device)
                self.books[layer] = Book(sketch, memory)
        self.groups = [g if group.sketched else None for g, group in enumerate(pool.groups)]
        self.group_of = {layer: g for g, group in enumerate(pool.groups) for layer in group.layers}

    @property
    def remembered(self) -> int:
        """Memory of choices that serve later rows. [bytes]"""
        return sum(book.memory.nbytes for book in self.books.values() if book.memory is not None)

    def start(self, row: int, start: SeqStart) -> None:
        """The sequence in `row`, if it chooses."""
        part, rule = self.rules.part(start.request), self.rules.selects(start.request)
        if not isinstance(part, Selector) or rule is None:
            return
        self.parts[row] = part
        self.since[row] = rule.since(start.prompt_len)
        self.keep[row], self.dense[row], self.reuse[row] = rule.pages, part.dense, rule.reuse
        self.odd[row], self.sketched[row] = not part.bounds, 0

    def stop(self, row: int) -> None:
        """The sequence in `row` leaves."""
        if self.parts.pop(row, None) is not None:
            self.since[row] = ENDLESS

    def step(self, batch: Batch, ends: bool = True) -> "SelectingStep | None":
        """What this step's layers do; None where nobody chooses, almost always.

        `ends` False: it is asked again of the same step, for layers that fewer rows go through.
        """
        if not self.parts:
            return None
        mine = np.array([row in self.parts for row in batch.rows.tolist()], np.bool_)
        if not mine.any():
            return None
        whole = self._whole(batch, mine)
        if ends:
            drafted = np.array([len(d.tokens) if d else 0 for d in batch.drafts] or [0], np.int64)
            known = batch.ends - drafted
            self.sketched[batch.rows[mine]] = known[mine] // self.image.page_size
        return SelectingStep(self, batch, whole)

    def _whole(self, batch: Batch, mine: Any) -> list[Ints]:
        """Pages without bounds that are whole after this step, by group."""
        rows, size = batch.rows[mine], self.image.page_size
        start = batch.ends[mine] - np.diff(batch.indptr)[mine]
        first = np.minimum(self.sketched[rows], start // size)  # a step may be planned once more
        count = batch.ends[mine] // size - first
        which = np.repeat(rows, count)
        nth = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count - first, count)
        return [table[which, nth].astype(np.int64) for table in self.image.tables]

    def rows(self, batch: Batch, group: int, rows: Ints, whole: Ints) -> SelectedRows:
        """The flattened `rows` of a batch choose."""
        owners, at = batch.row_of[rows], batch.positions[rows]
        size = self.image.page_size
        others = np.ones(len(batch.positions), np.bool_)
        others[rows] = False
        pages, inside = at // size + 1, at % size
        keep = np.minimum(self.keep[owners], pages)
        anew, places = np.ones(len(rows), np.bool_), np.arange(len(rows))
        if self.most:
            anew, places = self._shared(owners, at)
        return SelectedRows(
            batch.groups[group], rows, np.flatnonzero(others), pages, inside + 1, keep,
            self.image.tables[group], owners, whole, anew, places, bool(self.most),
            self.most or int(keep.max(initial=0)), np.flatnonzero(self.odd[owners]),
        )  # fmt: skip

    def _shared(self, owners: Ints, at: Ints) -> tuple[NDArray[np.bool_], Ints]:
        """Which rows choose anew (see `Select.anchor`), and where the lists of all of them are.

        The last `depth` choices of a sequence have places of their own: what a rejected draft has
        chosen is in no other one's.
        """
        size, reuse = self.image.page_size, self.reuse[owners]
        inside = at % size
        anew = at <= np.maximum(self.since[owners], at - inside % reuse)
        nth = at // size * -(-size // reuse) + inside // reuse
        return anew, owners * self.depth + nth % self.depth


@dataclass(slots=True)
class SelectingStep:
    """One step of a batch in which somebody chooses."""

    selecting: Selecting
    batch: Batch
    whole: list[Ints]  #: pages without bounds that are whole after this step, by group
    #: by group and number of choosing rows: these only become more from one layer to the next
    made: dict[tuple[int, int], tuple[Any, "Choosing"]] = field(default_factory=dict)

    def choice(self) -> Choice | None:
        """The step as one that can be replayed, if it is one."""
        this, batch = self.selecting, self.batch
        if this.state is None or not batch.decodes or batch.drafts:
            return None
        parts = [this.parts.get(row) for row in batch.rows.tolist()]
        dense = int(this.dense[batch.rows[0]])
        if any(part is None or not part.bounds or part.dense != dense for part in parts):
            return None
        groups = [group for group in this.groups if group is not None]
        if any(len(self.whole[group]) > len(parts) for group in groups):
            return None  # somebody has just begun
        every = np.arange(len(parts))
        rows = {group: this.rows(batch, group, every, self.whole[group]) for group in groups}
        return Choice(rows, dense, this.books)

    def plans(self) -> list[LayerPlan | None]:
        """The plans of the layers; None where one sees all."""
        this, batch = self.selecting, self.batch
        chooses = np.flatnonzero(batch.positions >= this.since[batch.row_of])
        owners = [row for row in batch.rows.tolist() if row in this.parts]
        first = this.dense[owners].min()
        plans: list[LayerPlan | None] = []
        for layer, group in sorted(this.group_of.items()):
            if this.groups[group] is None or layer < first:
                plans.append(None)
                continue
            rows = chooses[this.dense[batch.row_of[chooses]] <= layer]
            plan, choosing = self._plan(group, rows)
            plans.append(LayerPlan(plan, this.books[layer], partial(choosing.scores, layer)))
        return plans

    def _plan(self, group: int, rows: Ints) -> tuple[Any, "Choosing"]:
        """A plan in which the flattened `rows` choose, and how they do."""
        key = (group, len(rows))
        if key not in self.made:
            this = self.selecting
            parts = [this.parts[row] for row in self.batch.row_of[rows].tolist()]
            chosen = this.rows(self.batch, group, rows, self.whole[group])
            positions = upload([self.batch.positions[rows]], torch.int64, this.device)[0]
            plan: Any = None
            if this.state is not None:
                backend: Any = this.backend
                plan = backend.selected(chosen)
            else:
                plan = GatheringPlan(this.backend, chosen, this.device)
            self.made[key] = plan, Choosing(parts, positions)
        return self.made[key]


@dataclass(slots=True)
class Choosing:
    """The parts that R rows choose by."""

    parts: list[Selector]
    positions: Tensor  #: [R]

    def scores(self, layer: int, which: Ints, q: Tensor, sketch: Tensor, table: Tensor) -> Tensor:
        """See `Choose`: rows of one part all together."""
        mine = [self.parts[i] for i in which.tolist()]
        found = q.new_empty((len(which), sketch.shape[1], table.shape[1]), dtype=torch.float32)
        for part in dict.fromkeys(mine):
            some = np.flatnonzero([one == part for one in mine])
            at, those = upload([some, which[some]], torch.int64, q.device)
            pages = Pages(q[at], sketch, table[at], layer, self.positions[those])
            found[at] = part.select(pages)
        return found


def choices(drafts: int, reuse: int, page_size: int) -> int:
    """Choices that `drafts` + 1 positions in a row can see, at most."""
    pages = -(-drafts // page_size) if page_size % reuse else 0
    return 1 + -(-drafts // reuse) + pages
