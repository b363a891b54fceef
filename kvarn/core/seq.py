"""`Seq`: where one sequence of a request stands. Plain data; only the left side changes it."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvarn.core.keep import Filter, Keep, Select
from kvarn.core.plan import Draft, PageId, SeqId
from kvarn.core.request import Request


class Status(Enum):
    """A sequence waits, runs, or is done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Seq:
    """One sequence: its known tokens, how far its KV is computed, and its page tables."""

    id: SeqId
    request: Request
    index: int  #: which of the request's n sequences
    tokens: list[int]  #: prompt (what goes on of it, once it is filtered) and committed output
    goal: int  #: positions that will ever be computed: the last token's KV is never needed
    order: tuple[int, int]  #: (priority, arrival number): smaller goes first
    computed: int = 0  #: positions whose KV is in pages, counting the steps in flight
    pending: int = 0  #: tokens that steps in flight will append, or the first of several
    draft: Draft | None = None  #: to be verified by the next step that computes it to its end
    capacity: int = 0  #: positions that the tables have pages for
    tables: list[list[PageId]] = field(default_factory=list)  #: by group; NO_PAGE: given back
    keep: tuple[Keep, ...] = ()  #: what stays of its KV, by group; (): all
    select: Select | None = None  #: what its rows see of it; None: all
    filter: Filter | None = None  #: what says which tokens of its prompt go on; None: they all do
    chosen: list[int] | None = None  #: their positions in what was asked, once that is known
    spare: list[list[PageId]] = field(default_factory=list)  #: by group, for what stays
    published: int = 0  #: leading pages entered in the prefix index
    cursor: Any = None  #: the prefix-index node that this sequence pins
    generates: bool = True  #: False for embeddings and for prompts that are only scored
    sibling: "Seq | None" = None  #: the request's first sequence, to fork from (n > 1)
    stops: frozenset[int] = frozenset()  #: tokens that end it
    status: Status = Status.WAITING
    planned_step: int = -1  #: the last step that it was planned in
    planned_from: int = 0  #: where its span of that step starts
    cached: int = 0  #: prompt tokens found in the prefix cache at first admission
    preemptions: int = 0
    admitted_at: float | None = None  #: first time it entered a batch [s]
    first_token_at: float | None = None  #: [s]

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt that is computed: what goes on of it, once that is known."""
        return len(self.request.prompt) if self.chosen is None else len(self.chosen)

    @property
    def salt(self) -> str:
        """What tells its cached pages apart: those that hold the first layers only, too."""
        salt = self.request.cache_salt
        return salt if self.filter is None else f"{salt}\0{self.filter.layers}"

    @property
    def n_output(self) -> int:
        """Tokens generated and committed."""
        return len(self.tokens) - self.prompt_len

    def go_on(self, chosen: list[int], keep: tuple[Keep, ...]) -> None:
        """Nothing is computed yet, and only these positions of what was asked are the prompt, of
        whose KV the rule `keep` says what stays."""
        asked = self.request.prompt
        self.goal -= len(asked) - len(chosen)
        self.tokens = [asked[at] for at in chosen]
        self.filter, self.chosen, self.keep = None, chosen, keep

    @property
    def todo(self) -> int:
        """Positions to compute now: up to the known tokens plus those that are in flight."""
        known = len(self.tokens) + self.pending
        return (known if known < self.goal else self.goal) - self.computed
