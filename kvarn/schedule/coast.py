"""Many decode steps at once, with the outcome of planning and applying them one by one.

While nobody waits and every running sequence decodes, the next plan is known: one position for
each, in order. What such steps change is little (a token and a position for each sequence, a page
now and then), so a simulator need not form their plans. The real engine never coasts: it has
tokens to wait for. A property test compares the books of both ways, page for page.

Regime: full-attention groups (windows give pages back at every step), sequences that keep all
of their KV, and schedulers that say `coasts`: their plan for such a state is what is done here, and
they keep no state of their own.
"""

from collections.abc import Callable, Iterator, Sequence

from kvarn.core.seq import Seq
from kvarn.kv.manager import KVManager
from kvarn.schedule.control import ControlPlane


def can_coast(control: ControlPlane, in_flight: int = 0) -> int:
    """Steps that may be taken at once from here: none ends a sequence or lacks a page; 0: none.

    `in_flight`: tokens that every sequence still gets of steps that are planned and not applied.
    """
    running, kv = control.queues.running, control.kv
    if not running or control.queues.waiting or control.has_left or kv.has_windows:
        return 0
    if not control.scheduler.coasts or len(running) > control.budget:
        return 0
    most = 1 << 30
    for seq in running:
        if (
            seq.pending != in_flight
            or seq.todo != 1
            or not seq.generates
            or seq.first_token_at is None
        ):
            return 0
        if seq.keep or seq.select is not None:
            return 0
        most = min(
            most, seq.goal - len(seq.tokens) - in_flight
        )  # the step after these ends the sequence
        if most < 1:
            return 0
    return _with_pages(kv, running, most)


def _with_pages(kv: KVManager, running: Sequence[Seq], most: int) -> int:
    """The steps of `most` for which pages are there without anybody giving way."""
    size, room = kv.page_size, min(map(kv.available, range(len(kv.pages))))

    def needed(steps: int) -> int:
        return sum(-(-max(0, s.computed + steps - s.capacity) // size) for s in running)

    if needed(most) <= room:
        return most
    low, high = 0, most  # needs grow with the steps: low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= room else (low, middle)
    return low


def coast(
    control: ControlPlane, times: Sequence[float], token_of: Callable[[Seq], int]
) -> list[Seq]:
    """Take `len(times)` decode steps, at most `can_coast`; step i is planned at `times[i]` [s].

    `token_of` gives the token that every one of a sequence's steps commits. Returns the sequences,
    whose tokens, positions, tables and index entries are those that the steps one by one leave.
    """
    steps, kv = len(times), control.kv
    running = list(control.queues.running)
    starts = [seq.computed for seq in running]
    for step, place in sorted(_page_events(running, steps, kv.page_size)):
        seq, end = running[place], starts[place] + step
        _decode_to(seq, end - 1, token_of(seq))
        if end > seq.capacity:
            edits = kv.reserve(seq, end, times[step - 1])
            assert edits is not None, "can_coast promised room"
        seq.computed = end
        if end // kv.page_size > seq.published:
            kv.publish(seq, times[step - 1])
    for seq, start in zip(running, starts, strict=True):
        _decode_to(seq, start + steps, token_of(seq))
        seq.planned_from = start + steps - 1
    control.skip(steps)
    return running


def _page_events(running: Sequence[Seq], steps: int, size: int) -> Iterator[tuple[int, int]]:
    """(step, place) at which a sequence needs a page, or has one filled: first and last slot."""
    for place, seq in enumerate(running):
        for edge in (1 % size, 0):
            first = (edge - seq.computed - 1) % size + 1  # steps until `computed` is edge mod size
            yield from ((step, place) for step in range(first, steps + 1, size))
            if size == 1:
                break


def _decode_to(seq: Seq, computed: int, token: int) -> None:
    """Commit the tokens of the steps that bring `seq` to `computed` positions."""
    seq.tokens += [token] * (computed + 1 - len(seq.tokens))
    seq.computed = computed
