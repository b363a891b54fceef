"""Online speculation: the drafter learns from what verification says of its drafts (2310.07177).

Verification computes the target's distribution at every judged position anyway; where a sequence
ends, these are a lesson, and every few lessons are an update. New weights are made aside and put in
force between two steps, when nothing is drafted and no draft waits for its judgement. The version
before is kept, and comes back when the new one's drafts are accepted less (`Versions`).

Output never depends on any of this: a draft is judged by the target whoever made it. So sequences
that run keep the drafter's KV of the version before, which costs a little acceptance and saves
their catching up; KV that waits for prefix hits goes, since it would stay for ever; and when a
version is taken back all of its KV goes with it.

Regime: traffic that differs from what the drafter was trained on, and stays so for hundreds of
requests. Costs processor time that steps could have used, and turns at Python's one lock, so it
loses on a device that is busy; `idle` learns only while no request runs.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvarn.core.output import TrainerStats
from kvarn.core.part import Part
from kvarn.core.seq import Seq
from kvarn.models.decoder import Decoder
from kvarn.speculate.records import Record
from kvarn.speculate.train.corpus import TOP
from kvarn.speculate.train.lessons import Label, Lessons
from kvarn.speculate.train.updater import Update, Updates, Weights
from kvarn.speculate.train.versions import Versions
from kvarn.speculate.train.worker import Worker

log = logging.getLogger("kvarn.speculate")


@dataclass(slots=True)
class Pace:
    """How often an update is made."""

    interval: int = 8  #: sequences that end before the next, as in arXiv 2310.07177
    share: float = 0.25  #: of one core, on average, at most; where updates are made in a thread
    idle: bool = False  #: only while no request runs
    seldom: int = 4  #: `idle` then learns from one in so many steps: what they keep takes time


class OnlineTrainer(Part):
    """Called by the thread that steps, and by no other."""

    name, kind, paper = "online-spec", "trainer", "2310.07177"
    regime = (
        "Traffic unlike the drafter's training text, for hundreds of requests. Takes up to a "
        "quarter of one core; loses where that core is needed for steps, and at rest where "
        "nothing is drafted."
    )

    def __init__(
        self,
        updates: Updates,
        worker: Worker,
        weights: Weights,
        renew: Callable[[Decoder, bool], None],
        ask: Callable[[int], None],
        pace: Pace | None = None,
        versions: Versions | None = None,
        lessons: Lessons | None = None,
    ) -> None:
        """`weights`: in force now; `renew(decoder, keep_kv)` puts others in force.

        `ask(k)`: verification is to keep the target's k most likely tokens from now on.
        """
        self.updates, self.worker, self.renew, self.ask = updates, worker, renew, ask
        self.pace = pace or Pace()
        self.versions = versions or Versions()
        self.lessons = lessons or Lessons()
        self.failed = ""  #: why it has given up; "": it has not
        self.loss = self.seconds = 0.0
        self._weights = self._before = weights
        self._made: Update | None = None  # waits until the version in force is known
        self._stale = False  # what is being made follows from weights that were taken back
        self._not_before = 0.0
        self._steps = 0

    # what comes in

    def hear(self, records: Sequence[Record]) -> None:
        """Drafts were judged (see `kvarn.speculate.records`). An error ends the training."""
        if self.failed:
            return
        try:
            places = [(record.judged, record.accepted) for record in records]
            self.versions.saw(*map(sum, zip(*places, strict=True)))
            for record, (judged, accepted) in zip(records, places, strict=True):
                if record.alternatives is not None:
                    self.lessons.add(record.seq, labels_of(record, judged > accepted))
        except Exception as error:
            self._give_up(error)

    def forget(self, seq: Seq) -> None:
        """The sequence has ended, with `seq.tokens` as they are."""
        self.lessons.close(seq.id, seq.tokens)

    # what goes out

    def between_steps(self, waits: bool, runs: bool, now: float) -> None:
        """See `Trainer`. Raises nothing: an error ends the training, and takes back what is on
        trial."""
        if self.failed:
            return
        busy = waits or (runs and self.pace.idle)
        try:
            self.worker.yields(busy)
            self._judge()
            self._receive(now)
            self._begin(busy, now)
            self.ask(TOP if self._wants() else 0)
        except Exception as error:
            self._give_up(error)

    def _wants(self) -> bool:
        """Whether the coming step is to keep the target's words.

        Not while the buffer is full: what came now would push out what has not been learnt from.
        Keeping them takes time, which idle learning is not to cost steps."""
        if not self.pace.idle:
            return len(self.lessons) < self.lessons.most
        self._steps += 1
        return len(self.lessons) < self.pace.interval and self._steps % self.pace.seldom == 0

    def _judge(self) -> None:
        """Take the version in force back where it does worse than the one before."""
        if self.versions.verdict() == "roll back":
            self._roll_back()

    def _receive(self, now: float) -> None:
        """Put in force what has been made, once the version in force is known."""
        made = self.worker.result()
        if made is not None:
            self.loss, self.seconds = made.loss, self.seconds + made.seconds
            self._not_before = now + made.seconds * (1.0 / self.pace.share - 1.0)
            self._made = None if self._stale else made
        if self._made is not None and self.versions.ready:
            self.publish(self._made.weights)
            self._made = None

    def _begin(self, busy: bool, now: float) -> None:
        """Start on the next update, where there are lessons enough and it is time."""
        waits = self.worker.works or self._made is not None or busy or now < self._not_before
        if waits or len(self.lessons) < self.pace.interval:
            return
        lessons, begin = self.lessons.take(), self._weights if self._stale else None
        self._stale = False
        self.worker.begin(lambda go_on: self.updates.update(lessons, begin, go_on))

    def publish(self, weights: Weights) -> None:
        """Put weights in force, on trial."""
        version = self.versions.publish()
        self._before, self._weights = self._weights, weights
        self.renew(weights.decoder, True)
        log.info(
            "drafter version %d: %.2f nats; acceptance so far %.3f",
            version, self.loss, self.versions.before,
        )  # fmt: skip

    def _roll_back(self) -> None:
        worse, bad = self.versions.now.rate, self.versions.version
        version = self.versions.roll_back()
        self._weights, self._made, self._stale = self._before, None, True
        self.renew(self._weights.decoder, False)
        log.warning(
            "drafter version %d taken back: acceptance %.3f after %.3f; version %d again",
            bad, worse, self.versions.before, version,
        )  # fmt: skip

    def _give_up(self, error: Exception) -> None:
        self.failed = f"{type(error).__name__}: {error}"
        log.error("training of the drafter ends; drafts go on without", exc_info=error)
        try:
            self.ask(0)
            if self.versions.on_trial:
                self._roll_back()
        except Exception:
            log.exception("the drafter's version %d stays", self.versions.version)

    # what is there

    def stats(self) -> TrainerStats:
        """Counters and gauges of now."""
        versions = self.versions
        return TrainerStats(
            failed=self.failed,
            version=versions.version,
            published=versions.published,
            rolled_back=versions.rolled_back,
            acceptance_before=versions.before,
            acceptance=versions.now.rate,
            lessons=len(self.lessons),
            dropped=self.lessons.dropped,
            loss=self.loss,
            seconds=self.seconds,
        )

    def close(self) -> None:
        """Stop training; waits for the lesson under way."""
        self.worker.close()


def labels_of(record: Record, refused: bool) -> list[Label]:
    """What the target said at each place of the accepted path, and behind it.

    `refused`: the draft went on there, and was wrong.
    """
    return [
        Label(record.place + at, refused and at == record.accepted, top, logprobs)
        for at, (top, logprobs) in enumerate(zip(*record.alternatives, strict=True))
    ]
