"""What stands of drafts, and whatever follows from it, without a word from the host.

A device that judges a step's drafts itself can go on drafting behind them at once. The host has
laid that out as if no draft stood; what did moves everything on by as many positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.attention.tiles import HIGH, ROW, ROWS, START
from kvarn.kernels.triton.feed import token_of

BLOCK = 128
FIELDS = 8  #: of an item, and of a line of `where`
#: of a line of `where`: where its arrays begin in the buffer, their lengths, rows a sequence
RAW, PLACE, SLOTS, ITEMS, N_ROWS, N_ITEMS, PER = range(7)


@triton.jit
def stand_span(
    chosen, said, rows, columns, drafted, first, count, sure, to, last, moved, to_columns,
    FORCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for a span: `count` drafts behind its row `first`."""
    span = tl.program_id(0)
    begin = tl.load(first + span)
    n = tl.load(count + span)
    row = tl.load(to + span)
    at = tl.arange(0, BLOCK)
    inside = at < n
    draft = token_of(said, rows, drafted, columns, begin + 1 + at, inside)
    if FORCED:
        fits = tl.load(sure + begin + at, mask=inside, other=0) != 0
    else:
        fits = tl.load(chosen + begin + at, mask=inside, other=-1) == draft
    stood = tl.min(tl.where(inside & fits, BLOCK, at), 0)
    stood = tl.minimum(stood, n)
    before = token_of(said, rows, drafted, columns, begin + stood, True)
    newest = tl.maximum(tl.load(chosen + begin + stood), 0)
    tl.store(last + row * to_columns, before.to(tl.int32))
    tl.store(last + row * to_columns + 1, newest.to(tl.int32))
    tl.store(moved + row, stood.to(tl.int32))


@triton.jit
def remember_row(last, columns, rows, at, ids, size, n, BLOCK: tl.constexpr):
    """One program for a row of `last`: column `at` of ids [n, size]."""
    span = tl.program_id(0)
    row = tl.load(rows + span)
    column = tl.load(at + span)
    nth = tl.arange(0, BLOCK)
    token = tl.load(ids + nth * size + column, mask=nth < n, other=0)
    tl.store(last + row * columns + 1 + nth, token.to(tl.int32), mask=nth < n)


@triton.jit
def advance_part(
    buffer, where, movers, moved, table, width, page_size,
    RAW: tl.constexpr, PLACE: tl.constexpr, SLOTS: tl.constexpr, ITEMS: tl.constexpr,
    N_ROWS: tl.constexpr, N_ITEMS: tl.constexpr, PER: tl.constexpr, ROW: tl.constexpr,
    ROWS: tl.constexpr, START: tl.constexpr, HIGH: tl.constexpr, FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for a pass: a line of `where`."""
    line = where + tl.program_id(0) * FIELDS
    raw, place = buffer + tl.load(line + RAW), buffer + tl.load(line + PLACE)
    slots, items = buffer + tl.load(line + SLOTS), buffer + tl.load(line + ITEMS)
    n_rows, n_items, per = tl.load(line + N_ROWS), tl.load(line + N_ITEMS), tl.load(line + PER)
    for begin in range(0, n_rows, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < n_rows
        row = tl.load(movers + at // per, mask=inside, other=-1)
        moves = inside & (row >= 0)
        position = tl.load(raw + at, mask=inside, other=0)
        position += tl.load(moved + row, mask=moves, other=0)
        tl.store(place + at, position, mask=inside)
        slot = tl.load(slots + at, mask=inside, other=-1)
        writes = moves & (slot >= 0)
        page = tl.load(table + row * width + position // page_size, mask=writes, other=0)
        tl.store(slots + at, page * page_size + position % page_size, mask=writes)
    for begin in range(0, n_items, BLOCK):
        at = (begin + tl.arange(0, BLOCK)) * FIELDS
        inside = begin + tl.arange(0, BLOCK) < n_items
        count = tl.load(items + at + ROWS, mask=inside, other=0)
        first = tl.load(items + at + ROW, mask=inside, other=0)
        row = tl.load(movers + first // per, mask=inside & (count > 0), other=-1)
        moves = inside & (row >= 0)
        further = tl.load(moved + row, mask=moves, other=0)
        start = tl.load(items + at + START, mask=moves, other=0)
        high = tl.load(items + at + HIGH, mask=moves, other=0)
        ends = moves & (high == start + count)  # a piece that is not the last stays as long
        tl.store(items + at + START, start + further, mask=moves)
        tl.store(items + at + HIGH, high + further, mask=ends)


def stand(
    chosen: Tensor, said: Tensor, rows: Tensor, drafted: Tensor, spans: list[Tensor],
    sure: Tensor | None, last: Tensor, moved: Tensor,
) -> None:  # fmt: skip
    """How many drafts stand, `moved` [n_rows], and the tokens before and at the end, `last`.

    `chosen` [T] after each row of a step; `said` and `rows` as `feed` takes them, with `drafted`.
    `spans`: of each the first row, its drafts, and its row of what is written. `sure` [T]: they
    stand where this is not 0, whatever was chosen.
    """
    first, count, to = spans
    forced = sure is not None
    if len(first):
        stand_span[(len(first),)](
            chosen, said, rows, drafted.shape[1], drafted, first, count,
            chosen if sure is None else sure, to, last, moved, last.shape[1],
            forced, triton.next_power_of_2(drafted.shape[1]), num_warps=1,
        )  # fmt: skip


def remember(last: Tensor, rows: Tensor, at: Tensor, ids: Tensor) -> None:
    """last[rows, 1:] = ids[:, at]: what was drafted, ids [n, size] of any dtype."""
    n, size = ids.shape
    if len(rows):
        block = triton.next_power_of_2(n)
        remember_row[(len(rows),)](
            last, last.shape[1], rows, at, ids, size, n, block, num_warps=1
        )  # fmt: skip


def advance(
    buffer: Tensor, where: Tensor, movers: Tensor, moved: Tensor, table: Tensor, width: int,
    page_size: int,
) -> None:  # fmt: skip
    """Move the passes of a draft on: each a line of `where`, with arrays in the int32 `buffer`.

    Sequence s moves by `moved[movers[s]]` positions, and not at all where movers[s] is -1. RAW are
    the positions of its rows, which are written to PLACE; SLOTS and attention's ITEMS are those of
    no move at first. `table`: page tables of rows of `width` entries. Spans see all before them: a
    window, or a shared prefix, would want other items.
    """
    advance_part[(len(where),)](
        buffer, where, movers, moved, table, width, page_size,
        RAW, PLACE, SLOTS, ITEMS, N_ROWS, N_ITEMS, PER, ROW, ROWS, START, HIGH, FIELDS, BLOCK,
        num_warps=4,
    )  # fmt: skip


def parts(lines: list[list[int]], device: torch.device) -> Tensor:
    """`where`, of lines with the fields RAW to PER."""
    return torch.tensor([[*line, 0] for line in lines], dtype=torch.int32, device=device)
