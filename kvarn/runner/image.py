"""The device image: what the executor remembers of each sequence between steps, one row a sequence.

Plans carry only what changed; the image holds every known token and page table as arrays, so that a
step's batch is a few vectorised look-ups, however many sequences run.
"""

import numpy as np
from numpy.typing import NDArray

from kvarn.core.keep import ENDLESS
from kvarn.core.plan import Compaction, SeqId, SeqStart, TableEdit
from kvarn.core.request import Request

Ints = NDArray[np.int64]
NOBODY = -1  #: owner of a free row
DENSE = (ENDLESS, 0, 1)  #: no ring ever


class Image:
    """Rows of tokens and page tables; columns grow by doubling to the longest sequence seen.

    A step in flight has sampled tokens that only the device knows: `known` counts them, `filled`
    does not.
    """

    def __init__(self, n_rows: int, n_groups: int, page_size: int) -> None:
        self.page_size = page_size
        self.tokens: NDArray[np.int32] = np.zeros((n_rows, 1024), np.int32)
        self.known = np.zeros(n_rows, np.int64)  #: tokens of each row
        self.filled = np.zeros(n_rows, np.int64)  #: tokens whose values are in `tokens`
        self.prompt_len = np.zeros(n_rows, np.int64)
        self.owner = np.full(n_rows, NOBODY, np.int64)  #: sequence of each row
        self.tables: list[NDArray[np.int32]] = [
            np.zeros((n_rows, 64), np.int32) for _ in range(n_groups)
        ]
        #: [groups, rows, 3]: the position that a ring of slots begins with, its first slot, length
        self.rings = np.zeros((n_groups, n_rows, 3), np.int64)
        self.rings[:] = DENSE
        self.folds = np.zeros((n_groups, n_rows), np.bool_)  #: rings that are never seen whole
        self.kept: set[int] = set()  #: rows with rings
        self.turns: set[int] = set()  #: of these, those whose positions count in the cache
        self.requests: dict[int, Request] = {}  #: by row
        #: what was written into the tables, as (group, row, first column, pages); the device's
        #: copy takes and clears it
        self.writes: list[tuple[int, int, int, list[int]]] = []
        self._row: dict[SeqId, int] = {}
        self._free = list(range(n_rows - 1, -1, -1))

    def rows(self, seqs: list[SeqId]) -> Ints:
        """The rows of many sequences."""
        find = self._row
        return np.array([find[seq] for seq in seqs], np.int64)

    def row(self, seq: SeqId) -> int:
        """The row of a sequence."""
        return self._row[seq]

    def knows(self, seq: SeqId) -> bool:
        """Whether a sequence has a row."""
        return seq in self._row

    def start(self, start: SeqStart) -> int:
        """Give a sequence a row and fill it."""
        row = self._free.pop()
        self._row[start.seq] = row
        self.owner[row] = start.seq
        self.requests[row] = start.request
        self._widen_tokens(len(start.tokens) + 1)
        self.tokens[row, : len(start.tokens)] = start.tokens
        self.known[row] = self.filled[row] = len(start.tokens)
        self.prompt_len[row] = start.prompt_len
        width = max(map(len, start.tables), default=0)
        for group, pages in enumerate(start.tables):
            self._widen_table(group, width)  # none is looked up beyond its end
            self._write(group, row, 0, pages)
        for group, keep in enumerate(start.keep):
            self.kept.add(row)
            since = keep.since(start.prompt_len)
            self.rings[group, row] = (since, keep.budget - keep.recent, keep.recent)
            self.folds[group, row] = keep.folds
            if keep.turns:
                self.turns.add(row)
        return row

    def stop(self, seq: SeqId) -> int | None:
        """Free a sequence's row; None if it has none (its start failed, say)."""
        row = self._row.pop(seq, None)
        if row is not None:
            self._free.append(row)
            self.owner[row] = NOBODY
            del self.requests[row]
            if row in self.kept:
                self.kept.remove(row)
                self.turns.discard(row)
                self.rings[:, row] = DENSE
        return row

    def edit(self, edit: TableEdit) -> None:
        """Extend a page table."""
        self._write(edit.group, self._row[edit.seq], edit.at, edit.pages)

    def compact(self, move: Compaction) -> None:
        """Put the table of what was kept in the place of the old one."""
        self._write(move.group, self._row[move.seq], 0, move.pages)

    def places(self, group: int, rows: Ints, positions: Ints) -> tuple[Ints, Ints]:
        """Slots that `positions` of `rows` are written to, and the last slots that they see."""
        if not self.kept:
            return positions, positions
        since, first, length = self.rings[group, rows].T
        ring = positions >= since
        slots = np.where(ring, first + (positions - since) % length, positions)
        whole = ring & ~self.folds[group, rows]
        return slots, np.where(whole, first + length - 1, slots)

    def angles(self, rows: Ints, positions: Ints) -> Ints:
        """The positions that rows are rotated by: their slots, where they count in the cache."""
        if not self.turns:
            return positions
        slots, _ = self.places(0, rows, positions)
        mine = np.array([row in self.turns for row in rows.tolist()], np.bool_)
        return np.where(mine, slots, positions)

    def draft(self, seq: SeqId, tokens: list[int], late: bool = False) -> None:
        """Put proposed tokens behind the known ones, for one step; `commit` says what stays.

        `late`: they are not known yet."""
        row = self._row[seq]
        at = int(self.known[row])
        self._widen_tokens(at + len(tokens) + 1)
        if late:
            return
        self.tokens[row, at : at + len(tokens)] = tokens
        self.filled[row] = at + len(tokens)

    def commit(self, row: int, at: int, tokens: list[int]) -> None:
        """Known tokens of `row` from position `at` on, in place of whatever was proposed there."""
        end = at + len(tokens)
        self._widen_tokens(end + 1)
        self.tokens[row, at:end] = tokens
        self.known[row] = self.filled[row] = end

    def commit_all(self, rows: Ints, places: Ints, tokens: Ints) -> None:
        """`commit` for many: token i at position `places[i]` of `rows[i]`; a row's rise."""
        if len(rows):
            self._widen_tokens(int(places.max()) + 2)
        self.tokens[rows, places] = tokens
        self.known[rows] = self.filled[rows] = places + 1  # the last of a row counts

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of `row` from position `length` on."""
        self.known[row] = self.filled[row] = length

    def reserve(self, rows: Ints) -> Ints:
        """One more token for each of `rows` (distinct), its value to come: where it will be."""
        at = self.known[rows]
        if len(at):
            self._widen_tokens(int(at.max()) + 1)
        self.known[rows] = at + 1
        return at

    def fill(self, rows: Ints, owners: Ints, at: Ints, tokens: NDArray[np.int32]) -> None:
        """The values of reserved tokens; rows that have changed hands meanwhile are left alone."""
        mine = self.owner[rows] == owners
        if not mine.all():
            rows, at, tokens = rows[mine], at[mine], tokens[mine]
        self.tokens[rows, at] = tokens
        self.filled[rows] = at + 1

    def _write(self, group: int, row: int, at: int, pages: list[int]) -> None:
        self._widen_table(group, at + len(pages))
        self.tables[group][row, at : at + len(pages)] = pages
        self.writes.append((group, row, at, pages))

    def _widen_table(self, group: int, width: int) -> None:
        if width > self.tables[group].shape[1]:
            self.tables[group] = _widened(self.tables[group], width)

    def _widen_tokens(self, width: int) -> None:
        if width > self.tokens.shape[1]:
            self.tokens = _widened(self.tokens, width)


def _widened(array: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    """The array with at least `width` columns, at least twice as many as before."""
    wider = np.zeros((array.shape[0], max(width, 2 * array.shape[1])), array.dtype)
    wider[:, : array.shape[1]] = array
    return wider
