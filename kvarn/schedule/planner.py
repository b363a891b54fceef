"""`Planner`: one step in the making, with the verbs that a scheduler may use.

It keeps every rule that no scheduler may break: the token budget, page ownership, who may be
preempted for whom. A scheduler only chooses the order: `advance` running sequences, `admit` waiting
ones, and read `running`, `waiting` and `budget`.
"""

from bisect import insort
from collections.abc import Iterator

from kvarn.core.keep import clamp
from kvarn.core.plan import SeqStart, Span, StepPlan
from kvarn.core.seq import Seq, Status
from kvarn.kv.manager import KVManager


def order_of(seq: Seq) -> tuple[int, int]:
    """Who goes first: priority, then arrival."""
    return seq.order


class Queues:
    """The sequences of an engine by status, each kept in order."""

    def __init__(self) -> None:
        self.running: list[Seq] = []
        self.waiting: list[Seq] = []

    def enqueue(self, seq: Seq) -> None:
        """Put `seq` among the waiting, where its order belongs."""
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=order_of)

    def start(self, seq: Seq) -> None:
        """Move `seq` from waiting to running."""
        self.waiting.remove(seq)
        seq.status = Status.RUNNING
        insort(self.running, seq, key=order_of)

    def remove(self, seq: Seq) -> None:
        """Take `seq` out of whichever queue holds it."""
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)


class Planner:
    """Forms one `StepPlan`; made anew for each step."""

    def __init__(
        self, plan: StepPlan, queues: Queues, kv: KVManager, budget: int, max_seqs: int, now: float
    ) -> None:
        self.plan = plan
        self.kv = kv
        self.budget = budget  #: positions that may still be planned
        self.chunk = budget  #: most positions that one step could give a sequence
        self.max_seqs = max_seqs
        self.now = now
        self.preempted: list[Seq] = []
        self.admitted: list[Seq] = []  #: for the first time
        self._queues = queues
        self._whole: list[Seq] = []  # prompts that this step completes, and that go mostly
        self._watermark = [pages // 100 for pages in kv.pages]

    @property
    def running(self) -> list[Seq]:
        """Running sequences in order; a copy, since advancing one may preempt another."""
        return list(self._queues.running)

    @property
    def waiting(self) -> Iterator[Seq]:
        """Waiting sequences in order, without those that a running sibling will soon fork."""
        for seq in list(self._queues.waiting):
            if seq.pending == 0 and not self._soon_forked(seq):
                yield seq

    @property
    def has_waiting(self) -> bool:
        """Whether anybody waits at all."""
        return bool(self._queues.waiting)

    def advance(self, seq: Seq, count: int) -> bool:
        """Compute the next `count` positions of a running `seq` in this step, or fewer.

        False when there was no room: later sequences are preempted for it, but never earlier ones;
        with nobody left to preempt, `seq` itself goes back to the queue. A draft is verified with
        the last of its known tokens, as far as budget and free pages go: nobody makes way for it.
        """
        start = seq.computed
        if seq.keep:
            count = clamp(seq.keep, seq.prompt_len, start, count)
        end = start + count
        if self.kv.has_windows:
            self.kv.slide(seq, start)
        if end > seq.capacity and not self._make_room(seq, end):
            return False
        known = len(seq.tokens) + seq.pending
        layers = 0 if seq.filter is None else seq.filter.layers
        wants_logits = end == known and seq.generates and not layers
        drafts = self._add_draft(seq, count) if seq.draft is not None and wants_logits else 0
        self.plan.spans.append(Span(seq.id, start, count + drafts, drafts, wants_logits, layers))
        if layers:
            self.plan.partial = True
        seq.computed = end + drafts
        if wants_logits:
            seq.pending += 1
        seq.planned_step = self.plan.step
        seq.planned_from = start
        self.budget -= count + drafts
        if end // self.kv.page_size > seq.published:
            self.kv.publish(seq, self.now)
        if seq.keep and end == seq.prompt_len:
            self._whole.append(seq)
        return True

    def compact(self) -> None:
        """Once all spans are known: the prompts that are whole shrink to what is kept of them."""
        for seq in self._whole:
            self.plan.compactions += self.kv.compact(seq, self.now)

    def _add_draft(self, seq: Seq, count: int) -> int:
        """Put as much of the draft of `seq` into the plan as there is room for; its length."""
        draft, seq.draft = seq.draft, None
        assert draft is not None
        # positions after the last one that a sequence can need have no place in its tables
        room = min(self.budget - count, seq.goal - len(seq.tokens))
        drafts = min(len(draft.tokens), room) if seq.pending == 0 else 0
        end = seq.computed + count + drafts
        if drafts > 0 and end > seq.capacity:
            edits = self.kv.reserve(seq, end, self.now)
            if edits is None:
                return 0
            self.plan.edits += edits
        if drafts < 1:
            return 0
        self.plan.drafts[seq.id] = draft.first(drafts)
        return drafts

    def admit(self, seq: Seq, count: int | None = None) -> bool:
        """Let a waiting `seq` in, with up to `count` positions in this step; False if no room.

        Its cached prefix is not computed again; a sibling of a running sequence is forked from it.
        """
        if self.budget < 1 or len(self._queues.running) >= self.max_seqs:
            return False
        parent = self._parent(seq)
        if parent is not None and self.kv.can_fork(parent, seq):
            copies = self.kv.fork(parent, seq, self.now)
            if copies is None:
                return False
            self.plan.copies += copies
        else:
            match = self.kv.lookup(seq)
            spare = max(self._watermark) if self._queues.running else 0
            if not self.kv.fits(seq, match, spare, self.chunk):
                return False
            self.kv.attach(seq, match, self.now)
        if seq.admitted_at is None:
            seq.admitted_at = self.now
            seq.cached = seq.computed
            self.admitted.append(seq)
        self._queues.start(seq)
        todo = min(seq.todo, self.budget, seq.todo if count is None else count)
        edits_before = len(self.plan.edits)
        advanced = self.advance(seq, todo)
        assert advanced, "fits() promised room"
        del self.plan.edits[edits_before:]  # the whole table travels with the start
        self.plan.starts.append(
            SeqStart(
                seq.id,
                seq.request,
                seq.index,
                list(seq.tokens),
                seq.prompt_len,
                [list(table) for table in seq.tables],
                seq.keep,
            )
        )
        return True

    def preempt(self, seq: Seq) -> None:
        """Send a running `seq` back to the queue; it will be computed again (or found in cache)."""
        self._queues.remove(seq)
        self.kv.release(seq, self.now)
        seq.preemptions += 1
        seq.draft = None
        self.plan.stops.append(seq.id)
        self.preempted.append(seq)
        self._queues.enqueue(seq)

    def _make_room(self, seq: Seq, end: int) -> bool:
        while (edits := self.kv.reserve(seq, end, self.now)) is None:
            victim = self._victim(seq)
            self.preempt(victim)
            if victim is seq:
                return False
        self.plan.edits += edits
        return True

    def _victim(self, seq: Seq) -> Seq:
        """The last running sequence not in this step yet; `seq` if all others are before it."""
        for other in reversed(self._queues.running):
            if other is seq or other.order < seq.order:
                break
            if other.planned_step != self.plan.step:
                return other
        return seq

    def _parent(self, seq: Seq) -> Seq | None:
        """The running sibling to fork `seq` from, once earlier steps computed its prompt."""
        parent = self._sibling(seq)
        settled = parent is not None and self._settled(parent) >= seq.prompt_len - 1
        return parent if settled else None

    def _soon_forked(self, seq: Seq) -> bool:
        parent = self._sibling(seq)
        if parent is None:
            return False
        return parent.filter is not None or self._settled(parent) < seq.prompt_len - 1

    def _sibling(self, seq: Seq) -> Seq | None:
        """The running first sibling of a sequence that has no output yet."""
        parent = seq.sibling
        if parent is None or parent.status is not Status.RUNNING:
            return None
        return parent if len(seq.tokens) == seq.prompt_len else None

    def _settled(self, seq: Seq) -> int:
        """Positions of `seq` computed by earlier steps."""
        return seq.planned_from if seq.planned_step == self.plan.step else seq.computed
