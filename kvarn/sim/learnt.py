"""How well a drafter that learns drafts: a curve over its updates, fitted to what was measured.

A run with a real model (`kvarn reproduce online-spec`) says, by quarter of each phase of traffic,
with which share drafted tokens stood under a drafter that learns and under one that does not, on
the same texts. Their difference is fitted by start + (end - start) (1 - exp(-u / tau)), u being the
updates on the phase's subject. `end` is what was measured in the last quarter, so that nothing
better than that is ever assumed; tau is one for all phases and places, `start` one for each.

Where a phase follows another, `start` is below 0: what was learnt of the other subject was in the
way. A drafter's knowledge is therefore a share of each subject, 1 in all at most; an update moves
it towards what it was made of, and `start` counts as far as others are known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kvarn.core.errors import ConfigError, nearest
from kvarn.core.request import Request
from kvarn.core.seq import Seq

TAUS = tuple(0.5 * 1.1**i for i in range(50))  #: candidates, half an update to fifty
FROZEN, LONGER, LEARNS = "frozen, 2 tokens", "frozen, 4 tokens", "learns between steps"
Row = Mapping[str, Any]


@dataclass(slots=True, frozen=True)
class Subject:
    """What drafts on one subject come to; by place in the draft, the last for all further ones."""

    base: tuple[float, ...]  #: share that stands, of the drafter as it was made
    start: tuple[float, ...]  #: on top, where it has learnt other subjects only
    end: tuple[float, ...]  #: on top, where it has learnt this one


@dataclass(slots=True, frozen=True)
class Curve:
    """What was fitted."""

    subjects: dict[str, Subject]
    tau: float  #: updates after which a subject is known to 1 - 1/e
    lessons: float  #: requests of an update, in the measured run
    seconds: float  #: of an update there
    error: float  #: of the fit: root of the mean square, in shares, by quarter and place

    def moved(self, knows: Mapping[str, float], lessons: Sequence[str]) -> dict[str, float]:
        """The knowledge after an update on requests of these subjects."""
        old = math.exp(-len(lessons) / self.lessons / self.tau)
        each = (1.0 - old) / len(lessons)
        return {
            name: old * knows.get(name, 0.0) + each * lessons.count(name) for name in self.subjects
        }


@dataclass(slots=True)
class Turns:
    """Subjects follow each other by the clock, over and over."""

    names: tuple[str, ...]
    seconds: float  #: that each lasts

    def of(self, request: Request) -> str:
        """What a request is about: by when it came."""
        return self.names[int(request.arrival / self.seconds) % len(self.names)]


@dataclass(slots=True)
class Learnt:
    """`Acceptance` of a drafter that knows so much of each subject."""

    curve: Curve
    turns: Turns
    knows: dict[str, float] = field(default_factory=dict)  #: by subject; none at first

    def share(self, seq: Seq, place: int) -> float:
        """See `Acceptance`."""
        name = self.turns.of(seq.request)
        subject, known = self.curve.subjects[name], self.knows.get(name, 0.0)
        others = sum(self.knows.values()) - known
        moved = others * _at(subject.start, place) + known * _at(subject.end, place)
        return min(1.0, max(0.0, _at(subject.base, place) + moved))


def _at(shares: Sequence[float], place: int) -> float:
    return shares[min(place, len(shares) - 1)]


def check_subjects(curve: Curve, names: Sequence[str]) -> None:
    """Raise `ConfigError` for a subject that was not measured."""
    for name in names:
        if name not in curve.subjects:
            raise ConfigError(f"unknown subject {name!r}{nearest(name, curve.subjects)}")


def fitted(result: Mapping[str, Any]) -> Curve:
    """The curve of a result of `kvarn reproduce online-spec`.

    Updates count as spread evenly over the run. The first phase is what the drafter was made for
    and follows no other: nothing says what learning others costs there, and it counts as 0.
    """
    phases, rows = result["workload"]["phases"], result["results"]
    updates = result["training"][LEARNS]["published"]
    quarters = max(row["quarter"] for row in rows)
    step = updates / (quarters * len(phases))  # updates a quarter
    series = {
        (phase, place): _series(rows, phase, place)
        for phase in phases
        for place in range(len(_positions(rows, LEARNS)))
    }
    follows = {key: points for key, points in series.items() if key[0] != phases[0]}
    tau = min(TAUS, key=lambda one: sum(_fit(p, one, step)[2] for p in follows.values()))
    fits = {key: _fit(points, tau, step) for key, points in series.items()}
    subjects = {}
    for phase in phases:
        ours = [fit for (name, _), fit in fits.items() if name == phase]
        starts = tuple(0.0 if phase == phases[0] else fit[0] for fit in ours)
        subjects[phase] = Subject(_base(rows, phase), starts, tuple(fit[1] for fit in ours))
    weight = sum(w for points in follows.values() for _, w in points)
    missed = math.sqrt(sum(fits[key][2] for key in follows) / weight)
    requests = result["workload"]["requests"] * len(phases)
    seconds = result["training"][LEARNS]["seconds"] / updates
    return Curve(subjects, tau, requests / updates, seconds, missed)


def _positions(rows: Sequence[Row], setting: str) -> list[int]:
    """Places of a draft that were judged under a setting."""
    judged = next(row["judged"] for row in rows if row["setting"] == setting)
    return [place for place, count in enumerate(judged) if count]


def _series(rows: Sequence[Row], phase: str, place: int) -> list[tuple[float, float]]:
    """(learnt minus frozen, judged tokens) by quarter."""
    found = {(row["setting"], row["quarter"]): row for row in rows if row["phase"] == phase}
    quarters = sorted(quarter for setting, quarter in found if setting == LEARNS)
    pairs = [(found[LEARNS, quarter], found[FROZEN, quarter]) for quarter in quarters]
    return [
        (ours["acceptance"][place] - frozen["acceptance"][place], float(ours["judged"][place]))
        for ours, frozen in pairs
    ]


def _base(rows: Sequence[Row], phase: str) -> tuple[float, ...]:
    """Shares of the frozen drafter; further places are those of its longer drafts."""
    found = list[float]()
    for setting in (FROZEN, LONGER):
        mine = [row for row in rows if row["phase"] == phase and row["setting"] == setting]
        for place in _positions(rows, setting)[len(found) :]:
            judged = sum(row["judged"][place] for row in mine)
            stood = sum((row["acceptance"][place] or 0.0) * row["judged"][place] for row in mine)
            found.append(stood / judged)
    return tuple(found)


def _fit(points: Sequence[tuple[float, float]], tau: float, step: float) -> tuple[float, ...]:
    """(start, end, weighted sum of squares) of quarters of `step` updates each.

    A quarter's point is the mean of the curve over it, so that y - end = (start - end) x with x the
    mean of exp(-u / tau): weighted least squares of a line through 0.
    """
    edges = [math.exp(-i * step / tau) for i in range(len(points) + 1)]
    xs = [(a - b) * tau / step for a, b in pairwise(edges)]
    end = points[-1][0]
    both = sum(w * x * (y - end) for x, (y, w) in zip(xs, points))
    slope = both / sum(w * x * x for x, (_, w) in zip(xs, points))
    missed = sum(w * (y - end - slope * x) ** 2 for x, (y, w) in zip(xs, points))
    return end + slope, end, missed
