"""`StepPlan` crosses from decisions to computation, `StepResult` comes back. Plain data."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from kvarn.core.keep import Keep
from kvarn.core.request import Request

SeqId = int
PageId = int
LATE = -1  #: a drafted token that nobody knows yet


@dataclass(slots=True)
class Span:
    """Consecutive positions of one sequence that a step computes."""

    seq: SeqId
    start: int  #: first position computed [tokens from the start of the sequence]
    length: int  #: positions computed, drafts included
    drafts: int = 0  #: the last `drafts` of them are proposals to be verified
    wants_logits: bool = True  #: the last position's logits choose the next token
    layers: int = 0  #: only the first so many see it, to filter the prompt; 0: all


class Late(Protocol):
    """One chain of tokens that the device is choosing."""

    @property
    def seconds(self) -> float:
        """What that took it, with all that are chosen together; waits for it."""
        ...

    def said(self) -> tuple[list[int], list[float]]:
        """Tokens and the proposer's confidence in each, once they are there."""
        ...


@dataclass(slots=True)
class Draft:
    """Proposed continuations of one sequence: a chain, or a tree in topological order."""

    tokens: list[int] = field(default_factory=list)
    #: index of each token's parent, -1: the last committed token; None: a chain
    parents: list[int] | None = None
    #: how sure the proposer is that each is accepted, given that its parent is; in (0, 1]
    confidence: list[float] = field(default_factory=list)
    #: distributions [tokens, vocab] that a chain's tokens were drawn from; None: DELTA, the tokens
    #: are what they are and could have been no others (greedy, n-gram, suffix tree)
    q: Any = None
    #: a chain that the device is still choosing: its tokens and confidence are not known (`LATE`)
    #: before `settle`, which this is asked by; None: they are
    late: "Late | None" = None

    def first(self, count: int) -> "Draft":
        """The first `count` tokens; of a tree, too, what is left is one. Itself if that is all."""
        if count >= len(self.tokens):
            return self
        return Draft(
            self.tokens[:count],
            None if self.parents is None else self.parents[:count],
            self.confidence[:count],
            None if self.q is None else self.q[:count],
            self.late,
        )

    def settle(self) -> None:
        """Wait for what is not known yet."""
        if self.late is not None:
            tokens, confidence = self.late.said()
            count, self.late = len(self.tokens), None
            self.tokens[:], self.confidence[:] = tokens[:count], confidence[:count]

    @property
    def depth(self) -> int:
        """Tokens of the longest path: the most that can stand."""
        if self.parents is None:
            return len(self.tokens)
        depths = list[int]()
        for parent in self.parents:
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        return max(depths, default=0)

    @property
    def score(self) -> float:
        """Tokens expected to be accepted, as the proposer sees it."""
        reach, total = list[float](), 0.0
        for i, sure in enumerate(self.confidence):
            parent = i - 1 if self.parents is None else self.parents[i]
            reach.append(sure * (reach[parent] if parent >= 0 else 1.0))
            total += reach[-1]
        return total


@dataclass(slots=True)
class SeqStart:
    """A sequence enters the device image: admitted, resumed after preemption, or forked."""

    seq: SeqId
    request: Request
    index: int  #: which of the request's n sequences
    tokens: list[int]  #: every token known so far
    prompt_len: int
    tables: list[list[PageId]]  #: page table by group; entry i holds slots [i*page, (i+1)*page)
    keep: tuple[Keep, ...] = ()  #: by group; (): the slot of a position is its number, for ever


@dataclass(slots=True)
class TableEdit:
    """Write `pages` into a sequence's table of `group` from logical page `at` on."""

    seq: SeqId
    group: int
    at: int
    pages: list[PageId]


@dataclass(slots=True)
class PageCopy:
    """Copy page `source` to `target` in every layer of `group`, before the forward pass."""

    group: int
    source: PageId
    target: PageId


@dataclass(slots=True)
class Compaction:
    """Once a layer has attended, move `kept` positions of a sequence to `pages`, its new table.

    The pages of the old table are free from the next step on.
    """

    seq: SeqId
    group: int
    kept: int  #: positions
    pages: list[PageId]


@dataclass(slots=True)
class StepPlan:
    """Everything that one step does, in the order of the fields below."""

    step: int
    stops: list[SeqId] = field(
        default_factory=list
    )  #: leave the device image (finished, preempted)
    starts: list[SeqStart] = field(default_factory=list)
    edits: list[TableEdit] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    #: what the drafts of the spans are, by sequence
    drafts: dict[SeqId, Draft] = field(default_factory=dict)
    compactions: list[Compaction] = field(default_factory=list)
    partial: bool = False  #: whether some spans end at an earlier layer than the last

    @property
    def n_tokens(self) -> int:
        """Positions computed by the step."""
        return sum(span.length for span in self.spans)

    @property
    def has_work(self) -> bool:
        """False when the executor would have nothing to do at all."""
        return bool(self.spans or self.stops or self.copies)


@dataclass(slots=True)
class TokenLogprobs:
    """Logprob and rank of a token, and the most likely alternatives at its position."""

    token: int
    logprob: float
    rank: int  #: 1 is the most likely
    top: list[tuple[int, float]] = field(default_factory=list)  #: (token, logprob), best first


@dataclass(slots=True)
class Choice:
    """What of a prompt goes on, in the eyes of its first layers."""

    positions: list[int]  #: ascending
    lacking: int = 0  #: of these, positions that are there by rule alone


@dataclass(slots=True)
class SpanResult:
    """What one span gave, for the fields that only some requests ask for."""

    logprobs: list[TokenLogprobs] | None = None  #: one for each new token
    prompt_logprobs: list[TokenLogprobs] | None = None  #: of positions `scored_from` on
    scored_from: int = 0  #: a resumed sequence scores its prompt again, from the start
    embedding: list[float] | None = None  #: pooled hidden state, after the last position
    error: str | None = None  #: this request alone failed (a grammar that ran dry, say)
    choice: Choice | None = None  #: after the last position of a prompt that is filtered


@dataclass(slots=True)
class StepResult:
    """Tokens by span (same order as the plan's), extras where asked for, and durations."""

    step: int
    tokens: list[list[int]]  #: per span: tokens accepted; empty where `wants_logits` was off
    extras: dict[int, SpanResult] = field(default_factory=dict)  #: by index of the span
    seconds: float = 0.0  #: execution time of the step on the device
    #: by index of a span with drafts, an array [2, new tokens, k]: the model's most likely tokens
    #: at the place of each and their logprobs, best first; only where somebody learns from them
    alternatives: dict[int, Any] = field(default_factory=dict)
