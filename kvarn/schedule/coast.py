"""Many decode steps at once, with the outcome of planning and applying them one by one.

While nobody waits and every running sequence decodes, the next plan is known: one position for
each, in order. What such steps change is little (a token and a position for each sequence, a page
now and then, and who is done with the last of them), so a simulator need not form their plans. The
real engine never coasts: it has tokens to wait for, and an executor to tell who left. A property
test compares the books of both ways, page for page.

Regime: full-attention groups (windows give pages back at every step), sequences that keep all of
their KV, and schedulers that say `coasts`: their plan for such a state is what is done here, and
they keep no state of their own.
"""

from collections.abc import Callable, Iterable, Sequence

from kvarn.core.seq import Seq
from kvarn.kv.manager import KVManager
from kvarn.schedule.control import ControlPlane, Progress


def can_coast(
    control: ControlPlane, limit: int = 1 << 30, in_flight: int = 0, ahead: bool = False
) -> int:
    """Steps that may be taken at once from here, at most `limit`; 0: none.

    None lacks a page, and none but the last ends a sequence. `in_flight`: tokens that every
    sequence still gets of steps that are planned and not applied. `ahead`: each step is planned
    when the one before it begins, so the plan behind the last of them must be known as well.
    """
    running, kv = control.queues.running, control.kv
    if not running or control.queues.waiting or kv.has_windows:
        return 0
    if not control.scheduler.coasts or len(running) > control.budget:
        return 0
    end = 1 << 62
    for seq in running:
        known, goal = len(seq.tokens) + in_flight, seq.goal
        if seq.pending != in_flight or seq.computed != known - 1 or known > goal:
            return 0  # of a prompt there is more to do, or other answers are on their way
        if not seq.generates or (seq.first_token_at is None and not in_flight):
            return 0
        if seq.keep or seq.select is not None:
            return 0
        if goal - known < end:
            end = goal - known
    end += 1  # the step that ends a sequence
    if not ahead:
        return _with_pages(kv, running, min(limit, end))
    steps = _with_pages(kv, running, min(limit + 1, end))
    if steps == end <= limit and _goes_on(running, end, kv.page_size):
        return end
    return max(steps - 1, 0)


def steps_to_end(control: ControlPlane) -> int:
    """Decode steps up to the first that ends a sequence, where nothing is in flight."""
    return min(seq.goal - len(seq.tokens) for seq in control.queues.running) + 1


def _goes_on(running: Sequence[Seq], end: int, size: int) -> bool:
    """Whether the plan behind step `end`, which ends sequences, changes no page books.

    Then it is the same before these give their pages back as after.
    """
    left = False
    for seq in running:
        computed = seq.computed + end
        if computed < seq.goal:
            left = True
            if computed >= seq.capacity and computed % size == 0:
                return False  # it takes a page
    return left


def _with_pages(kv: KVManager, running: Sequence[Seq], most: int) -> int:
    """The steps of `most` for which pages are there without anybody giving way."""
    size, room = kv.page_size, min(map(kv.available, range(len(kv.pages))))
    if len(running) * -(-most // size) <= room:
        return most

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
    control: ControlPlane,
    steps: int,
    began: Callable[[int], float],
    token_of: Callable[[Seq], int],
) -> list[Seq]:
    """Take `steps` decode steps, at most `can_coast`; step i, from 0, is planned at `began(i)` [s].

    `token_of` gives the token that every one of a sequence's steps commits. Returns the sequences,
    whose tokens, positions, tables and index entries are those that the steps one by one leave;
    `settle` ends those that are done.
    """
    kv = control.kv
    running = list(control.queues.running)
    ends = [seq.computed + steps for seq in running]
    for step, place in sorted(_page_events(running, steps, kv.page_size)):
        seq = running[place]
        end = ends[place] - steps + step
        _decode_to(seq, end - 1, token_of(seq))
        if end > seq.capacity:
            edits = kv.reserve(seq, end, began(step - 1))
            assert edits is not None, "can_coast promised room"
        seq.computed = end
        if end // kv.page_size > seq.published:
            kv.publish(seq, began(step - 1))
    for seq, end in zip(running, ends, strict=True):
        _decode_to(seq, end, token_of(seq))
    control.skip(steps)
    return running


def settle(control: ControlPlane, seqs: Iterable[Seq], now: float) -> list[Progress]:
    """End those of `seqs` whose last token `coast` committed, by a step that ended at `now` [s]."""
    done = [seq for seq in seqs if len(seq.tokens) > seq.goal]
    for seq in done:
        control.finish(seq, "length", now)
    return [Progress(seq, seq.tokens[-1:], "length") for seq in done]


def _page_events(running: Sequence[Seq], steps: int, size: int) -> list[tuple[int, int]]:
    """(step, place) at which a sequence needs a page, or has one filled: first and last slot."""
    found: list[tuple[int, int]] = []
    for place, seq in enumerate(running):
        now = seq.computed
        if now + steps > seq.capacity:
            first = (1 % size - now - 1) % size + 1  # steps until `computed` is 1 mod size
            found += [(step, place) for step in range(first, steps + 1, size)]
        if (now + steps) // size > seq.published:
            found += [(step, place) for step in range(size - now % size, steps + 1, size)]
    return found


def _decode_to(seq: Seq, computed: int, token: int) -> None:
    """Commit the tokens of the steps that bring `seq` to `computed` positions."""
    seq.tokens += [token] * (computed + 1 - len(seq.tokens))
    seq.computed = computed
