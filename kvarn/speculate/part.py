"""The words of speculation: drafts, verification records, and the two seams that make them.

A round: the length control says how many tokens to draft for each sequence (`plan`), the proposer
drafts them (`propose`), the next step verifies them together with its ordinary rows, and the
control and the proposer learn what was accepted (`observe`). Nothing that they say can change what
is generated: drafts are checked against the target model, so they cost time and never quality.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvarn.core.output import TrainerStats
from kvarn.core.plan import Draft, SeqId
from kvarn.core.seq import Seq

__all__ = ["Ask", "Costs", "Draft", "LengthControl", "Proposer", "Round", "Trainer", "Verified"]


@dataclass(slots=True)
class Ask:
    """A sequence to draft for, and the most tokens wanted (at least 1)."""

    seq: Seq  #: caught up: all of `seq.tokens` but the last are computed
    most: int


@dataclass(slots=True)
class Verified:
    """What verification said of one sequence's draft in one step.

    A tree costs the step all of its tokens, and only as many as it is deep can stand.
    """

    seq: SeqId
    drafted: int  #: tokens proposed; 0: it decoded as without speculation
    accepted: int  #: of those, accepted
    confidence: list[float] = field(default_factory=list)  #: the proposer's, by token
    depth: int = -1  #: tokens of the longest path; -1: a chain's, which are all of them
    #: places that were judged: those accepted, and the one where a path that goes on was refused;
    #: -1: a chain's
    judged: int = -1

    def __post_init__(self) -> None:
        if self.depth < 0:
            self.depth = self.drafted
        if self.judged < 0:
            self.judged = min(self.accepted + 1, self.drafted)


class Costs(Protocol):
    """What steps and drafts cost now, in seconds; measured by the engine as it goes."""

    def step(self, rows: int) -> float:
        """A step without drafts that computes `rows` positions for the sequences that run."""
        ...

    def verifying(self, rows: int) -> float:
        """A step that computes `rows` positions, drafts among them."""
        ...

    def reach(self) -> int:
        """Positions of the largest step with drafts whose time is more than a guess."""
        ...

    def draft(self, seqs: int, most: int) -> float:
        """Drafting up to `most` tokens for each of `seqs` sequences."""
        ...

    def reading(self, tokens: int) -> float:
        """What the proposer takes to read so many tokens of the sequences; 0: not known."""
        ...

    def back(self) -> float:
        """What the first step without drafts after one with them costs more than others."""
        ...

    def look(self) -> float:
        """Asking a length control that wants no drafts."""
        ...

    def knows(self, rows: int) -> bool:
        """Whether `step(rows)` is more than a guess."""
        ...


@dataclass(slots=True)
class Round:
    """What a length control sees when it plans a round."""

    seqs: list[Seq]  #: those that could be drafted for
    room: list[int]  #: most tokens that each could still use, by its end and the step's budget
    others: int  #: positions of the coming step that belong to others (prompts, rows without draft)
    costs: Costs
    behind: list[int] = field(default_factory=list)  #: `Proposer.behind` of each; []: 0


class LengthControl(Protocol):
    """How many tokens to draft. Left side: plain data in, plain data out; keeps its own state."""

    #: whether `goes_on` may say no, and that is worth waiting for where a draft comes as a whole
    looks: bool

    def rests(self) -> bool:
        """Asked first in every round: whether nobody is drafted for, whoever runs."""
        ...

    def plan(self, round_: Round) -> list[int]:
        """Tokens to draft for each sequence of the round; 0: none."""
        ...

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """In-round stop: whether to draft one more token after those of these confidences."""
        ...

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        """Learn from a step for which drafts were asked, found or not: its records, and the seconds
        of it (0: it computed prompts too, which says nothing of drafts) and of the drafting."""
        ...

    def forget(self, seq: SeqId) -> None:
        """The sequence has ended."""
        ...


class Proposer(Protocol):
    """Who guesses. `propose` sees committed tokens only; whatever it keeps it catches up itself."""

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        """A draft for each ask, with at most `most` tokens; an empty one where it knows nothing.

        A proposer that drafts token by token asks `control.goes_on` after each.
        """
        ...

    def behind(self, seq: Seq) -> int:
        """Tokens of the sequence that it must read before it drafts for it.

        A prompt, at first: what a round costs for that is no measure of the next.
        """
        ...

    def observe(self, records: Sequence[Verified]) -> None:
        """Learn what was accepted."""
        ...

    def forget(self, seq: Seq) -> None:
        """The sequence has ended, with `seq.tokens` as they are."""
        ...


class Trainer(Protocol):
    """Who teaches the proposer from what verification says (`Speculation.listeners`).

    Nothing here may raise or wait long.
    """

    def forget(self, seq: Seq) -> None:
        """The sequence has ended, with `seq.tokens` as they are."""
        ...

    def between_steps(self, waits: bool, runs: bool, now: float) -> None:
        """No draft is being made or judged: new weights may be put in force.

        Whether requests wait for a place, whether any run; `now`: any steady clock [s].
        """
        ...

    def stats(self) -> TrainerStats:
        """Counters and gauges of now."""
        ...

    def close(self) -> None:
        """Stop."""
        ...
