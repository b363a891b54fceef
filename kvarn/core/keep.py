"""What stays of a sequence's KV (`Keep`), is read of it (`Select`), and of a prompt (`Filter`).

A cache with a budget is a row of slots. While it grows, position p is in slot p. A prompt longer
than the budget is computed whole; then `budget` of its positions move together into the first slots
(which ones is the business of `kvarn.sparse`, and differs by layer and head). From then on the last
`recent` slots are a ring: each new position takes the place of the oldest recent one. So slots have
no order that attention would have to know of, and a cache never holds more than `budget` positions.

A sequence with a `Select` keeps all; what is generated sees some pages of it, others for each
layer, KV head and row.

A `Filter` is for prompts: the first layers see all of it and say which tokens go on; these are then
computed anew as a prompt of their own.
"""

from dataclasses import dataclass

ENDLESS = 1 << 60


@dataclass(slots=True, frozen=True)
class Keep:
    """The rule of one sequence in one KV group. [positions]"""

    budget: int  #: slots
    recent: int  #: the last of them, a ring
    watch: int = 0  #: last positions of the prompt whose queries say what stays
    turns: bool = False  #: what is before the ring is written again at every step
    streamed: bool = False  #: the ring begins at `budget`, in the midst of a prompt too
    folds: bool = False  #: a ring that is full is not written over: all slots are chosen from anew

    def since(self, prompt_len: int) -> int:
        """The first position that goes to the ring."""
        return self.budget if self.streamed else max(self.budget, prompt_len)

    def compacts(self, prompt_len: int) -> bool:
        """Whether a prompt is computed whole before most of it goes."""
        return not self.streamed and prompt_len > self.budget

    def slots(self, prompt_len: int, computed: int, end: int) -> int:
        """Slots for the positions up to `end`, or up to where the prompt will be compacted."""
        whole = self.compacts(prompt_len) and computed < prompt_len
        return min(end, prompt_len if whole else self.budget)

    def seen(self, prompt_len: int, start: int) -> int:
        """Positions that the one at `start` attends to beside itself."""
        since = self.since(prompt_len)
        if start < since:
            return start
        if self.folds:
            return self.budget - self.recent + (start - since) % self.recent
        return self.budget - 1

    def shared(self, prompt_len: int) -> int:
        """Leading positions that may be in the prefix index: dense, and never written again."""
        if self.compacts(prompt_len):
            return prompt_len
        return 0 if self.turns or self.folds else self.budget - self.recent


@dataclass(slots=True, frozen=True)
class Select:
    """The rule of one sequence whose rows see `pages` of its pages each."""

    pages: int  #: chosen for every row, layer and KV head
    page_size: int
    dense: float = 0.0  #: share of the layers that see all
    reuse: int = 1  #: rows of a page that share a choice

    def since(self, prompt_len: int) -> int:
        """The first position that chooses: generated, and with more before it than it may see."""
        return max(prompt_len, self.pages * self.page_size)

    def anchor(self, prompt_len: int, position: int) -> int:
        """The position, this one or before it, whose choice the one at `position` sees.

        Counted in the page: the first position of a page always chooses anew, and what is known of
        a sequence by its pages (a prefix hit, say) never ends between a choice and its use.
        """
        offset = position % self.page_size
        return min(position, max(self.since(prompt_len), position - offset % self.reuse))

    def seen(self, prompt_len: int, start: int) -> int:
        """Positions that are read for the one at `start`, whatever they are read for.

        What a page is chosen by, two vectors, is as large as the K and V of one position; rows
        that share a choice share it evenly.
        """
        if start < self.since(prompt_len):
            return start
        chosen = min(start, self.pages * self.page_size + start // self.page_size // self.reuse)
        return round(self.dense * start + (1 - self.dense) * chosen)


@dataclass(slots=True, frozen=True)
class Filter:
    """The rule of one sequence whose prompt is read twice: by the first layers, then a part of it.

    `budget` tokens go on, at positions 0 to budget - 1, through all layers.
    """

    layers: int  #: first layers, through which the whole prompt goes
    budget: int  #: tokens that go on
    sinks: int  #: of these, the first of the prompt
    recent: int  #: and the last

    def spread(self, prompt_len: int) -> list[int]:
        """Positions that could go on, where nobody computes which: evenly spread in the middle."""
        last = prompt_len - self.recent
        middle, room = self.budget - self.sinks - self.recent, last - self.sinks
        chosen = [self.sinks + i * room // middle for i in range(middle)]
        return [*range(self.sinks), *chosen, *range(last, prompt_len)]


def clamp(keeps: tuple[Keep, ...], prompt_len: int, start: int, count: int) -> int:
    """Of `count` positions from `start` on, those that one step may compute.

    A step ends where a ring begins; in a ring positions come one by one, since each takes the place
    of one that those before it still see.
    """
    for keep in keeps:
        since = keep.since(prompt_len)
        count = min(count, since - start if start < since else 1)
    return count
