"""`StepPlan` crosses from decisions to computation, `StepResult` comes back. Plain data."""

from dataclasses import dataclass, field

from kvarn.core.request import Request

SeqId = int
PageId = int


@dataclass(slots=True)
class Span:
    """Consecutive positions of one sequence that a step computes."""

    seq: SeqId
    start: int  #: first position computed [tokens from the start of the sequence]
    length: int  #: positions computed, drafts included
    drafts: int = 0  #: the last `drafts` of them are proposals to be verified
    wants_logits: bool = True  #: the last position's logits choose the next token


@dataclass(slots=True)
class SeqStart:
    """A sequence enters the device image: admitted, resumed after preemption, or forked."""

    seq: SeqId
    request: Request
    index: int  #: which of the request's n sequences
    tokens: list[int]  #: every token known so far
    prompt_len: int
    tables: list[list[PageId]]  #: page table by group; entry i holds positions [i*page, (i+1)*page)


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
class SpanResult:
    """What one span gave, for the fields that only some requests ask for."""

    logprobs: list[TokenLogprobs] | None = None  #: one for each new token
    prompt_logprobs: list[TokenLogprobs] | None = None  #: of positions `scored_from` on
    scored_from: int = 0  #: a resumed sequence scores its prompt again, from the start
    embedding: list[float] | None = None  #: pooled hidden state, after the last position
    error: str | None = None  #: this request alone failed (a grammar that ran dry, say)


@dataclass(slots=True)
class StepResult:
    """Tokens by span (same order as the plan's), extras where asked for, and durations."""

    step: int
    tokens: list[list[int]]  #: per span: tokens accepted; empty where `wants_logits` was off
    extras: dict[int, SpanResult] = field(default_factory=dict)  #: by index of the span
    seconds: float = 0.0  #: execution time of the step on the device
