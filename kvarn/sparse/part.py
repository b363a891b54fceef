"""`Sparsity`, the seam of eviction and selection: a part defines the hooks that it has.

- `keep`, on append: how many positions stay and where the next go, plain numbers that are known
  before anything runs; `split`: the table groups that this needs.
- `observe`: what rows of the prompt say, as they are computed.
- `score`, after prefill: what of a whole prompt stays, by layer and KV head; with a `keep` that
  folds also every few steps, of all that is held.
- `filter`: how many layers see a prompt whole, and how many of its tokens go on to the others;
  `PromptFilter.score` says which.
- `select`, at every row that is generated: which pages it sees, by layer and KV head; `rule`: how
  many.

Numbers are decided on the left (`keep`, `rule`: so the simulator admits and prices as the engine
does), contents on the right (`observe`, `score`, `select`), on tensors whose methods are all that
is used here.

Shapes: q [t, Hq, d] and k [L, Hkv, d] of one layer and one sequence, rotated as cached.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from kvarn.core.errors import ConfigError
from kvarn.core.keep import Filter, Keep, Select
from kvarn.core.model import GroupSpec
from kvarn.core.part import Cap, Part, find

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 3  #: pages of a selection: the first, the one being written, and one that is chosen


@dataclass(slots=True)
class Prompt:
    """A prompt whose KV is all there, in one layer."""

    k: "Tensor"  #: [L, Hkv, d]
    mass: "Tensor | None"  #: [Hkv, L] fp32: attention of the watched rows, as `observe` summed it
    layer: int


class Sparsity(Part):
    """Base of all parts of the kind "sparsity". Fields of the subclasses are their options."""

    kind: ClassVar[str] = "sparsity"
    needs: ClassVar[frozenset[Cap]] = frozenset({Cap.PAGED_KV, Cap.TABLE_GROUPS})
    #: whether its table groups hold every request to its rule: an engine's own part, and no other
    #: may be asked for beside it
    fixed: ClassVar[bool] = False

    def split(self, groups: list[GroupSpec]) -> list[GroupSpec]:
        """The table groups that it wants, of those of the model."""
        return groups

    def keep(self, group: GroupSpec, n_layers: int) -> Keep | None:
        """The rule of a sequence in `group` of a model of `n_layers`; None: everything stays."""
        return None

    def rule(self, page_size: int, n_layers: int) -> Select | None:
        """What rows of a sequence see of its pages, in a model of `n_layers`; None: all."""
        return None

    def filter(self, n_layers: int) -> Filter | None:
        """What of its prompt goes on, in a model of `n_layers`; None: all."""
        return None

    def check(self, page_size: int, groups: int) -> None:
        """Raise `ConfigError` for options that cannot be, with so many table groups."""


@dataclass(slots=True, frozen=True)
class OneShot(Sparsity):
    """Eviction once, after the prompt: `sinks`, the best of the middle, and `recent` stay.

    What is generated afterwards takes the places of the recent positions one by one, so that the
    cache never grows beyond `budget`.
    """

    budget: int = 1024  #: positions kept of every head [tokens]
    sinks: int = 16  #: of these, the first of the prompt
    recent: int = 0  #: and the last; 0: a quarter of the budget

    watch: ClassVar[int] = 0  #: last rows of the prompt whose attention is summed up
    newest: ClassVar[float] = 0.0  #: share of what stays, at least, where it chooses again

    @property
    def sums(self) -> bool:
        """Whether the sums of what is held go on with the rows that are generated."""
        return False

    @property
    def turns(self) -> bool:
        """Whether queries see the sinks at their place in the cache, not in the text."""
        return False

    def keep(self, group: GroupSpec, n_layers: int) -> Keep | None:
        """See `Sparsity`."""
        return Keep(self.budget, self.recent or self.budget // 4, self.watch)

    def check(self, page_size: int, groups: int) -> None:
        """See `Sparsity`."""
        least = self.sinks + max(1, self.recent) + 1
        if self.sinks < 0 or self.recent < 0 or self.budget < max(least, 4):
            raise ConfigError(
                f"{self.kind} {self.name!r}: budget={self.budget} is below sinks + recent + 1 = "
                f"{least}; raise budget, or lower sinks={self.sinks} and recent={self.recent}"
            )

    def observe(self, q: "Tensor", k: "Tensor", start: int) -> "Tensor":
        """What rows q, at positions `start` on, say of the positions so far: [Hkv, L] fp32."""
        raise NotImplementedError(f"{self.name} watches no rows")

    def score(self, prompt: Prompt) -> "Tensor":
        """How much each position is worth keeping: [Hkv, L] fp32."""
        raise NotImplementedError


@dataclass(slots=True)
class Pages:
    """What R rows may choose from, in one layer: whole pages by the bounds of their keys.

    A row that has fewer than P of them has any others behind its own.
    """

    q: "Tensor"  #: [R, Hkv, Hq / Hkv, d]
    sketch: "Tensor"  #: [pages, Hkv, 2, d] the bounds of all pages that there are
    table: "Tensor"  #: [R, P] of these, the pages of each row
    layer: int
    positions: "Tensor"  #: [R] of the rows

    @property
    def low(self) -> "Tensor":
        """[R, P, Hkv, d] the least of each number among a page's keys."""
        return self.sketch[self.table][:, :, :, 0]

    @property
    def high(self) -> "Tensor":
        """[R, P, Hkv, d] the largest."""
        return self.sketch[self.table][:, :, :, 1]


@dataclass(slots=True, frozen=True)
class Selector(Sparsity):
    """Everything stays; what is generated sees the pages that matter to each row.

    The page being written and the first are always among them. A row of a prompt, and one that has
    no more pages before it than it may see, sees all. With `reuse` a choice serves the rows after
    it as well (the reusable selector of LServe, arXiv 2502.14866: neighbours choose much the same).
    """

    budget: int = 2048  #: positions seen of every head, in whole pages [tokens]
    dense: int = 2  #: first layers, whose rows see all: their attention is spread widely
    reuse: int = 1  #: rows that see what the first of them chose, counted in each page; 1: none

    #: whether `select` is the upper bound of the keys' products with a query of the KV head, the
    #: largest of its queries: which a GPU's kernel computes for all rows together
    bounds: ClassVar[bool] = False

    def split(self, groups: list[GroupSpec]) -> list[GroupSpec]:
        """See `Sparsity`: the same groups, with bounds beside their pages."""
        return [replace(group, sketched=group.window is None) for group in groups]

    def rule(self, page_size: int, n_layers: int) -> Select:
        """See `Sparsity`."""
        dense = min(1.0, self.dense / n_layers)
        return Select(self.budget // page_size, page_size, dense, self.reuse)

    def check(self, page_size: int, groups: int) -> None:
        """See `Sparsity`."""
        if page_size < 2:
            raise ConfigError(
                f"sparsity {self.name!r} chooses pages by the bounds of their keys, which are no "
                f"smaller than the keys of a page of {page_size}; use a page_size of 8 or more"
            )
        if self.budget < LEAST * page_size:
            raise ConfigError(
                f"sparsity {self.name!r}: budget={self.budget} is below {LEAST} pages of "
                f"{page_size} positions; raise it to {LEAST * page_size} at least"
            )
        if self.dense < 0:
            raise ConfigError(f"sparsity {self.name!r}: dense={self.dense} must be 0 or more")
        if not 1 <= self.reuse <= page_size:
            raise ConfigError(
                f"sparsity {self.name!r}: reuse={self.reuse} must be from 1, every row chooses, to "
                f"page_size={page_size}: the first row of a page always does"
            )

    def select(self, pages: Pages) -> "Tensor":
        """How much each page matters to each row: [R, Hkv, P] fp32."""
        raise NotImplementedError


@dataclass(slots=True, frozen=True)
class PromptFilter(Sparsity):
    """The first layers see the whole prompt and choose tokens of it; all layers see these alone.

    Tokens that go on stand at positions 0, 1, ..: a prompt of its own, whose KV is kept whole.
    """

    budget: int = 1024  #: tokens that go on
    sinks: int = 1  #: of these, the first of the prompt
    recent: int = 32  #: and the last
    layer: int = -1  #: whose queries choose; -1: `depth` of the way up
    upper: float = 1.0  #: pages for the layers after it, over those for it (an engine's own part)
    then: str = ""  #: a part that evicts, for the KV of what goes on; none: it stays
    stays: int = 0  #: its budget; 0: half of `budget`

    depth: ClassVar[float] = 0.7  #: of the layer that chooses, where none is named

    def split(self, groups: list[GroupSpec]) -> list[GroupSpec]:
        """See `Sparsity`: the layers that see whole prompts, and the others."""
        rule = self.filter(sum(len(group.layers) for group in groups))
        found = list[GroupSpec]()
        for group in groups:
            first = tuple(layer for layer in group.layers if layer < rule.layers)
            others = tuple(layer for layer in group.layers if layer >= rule.layers)
            if first:
                found.append(replace(group, layers=first))
            if others:
                found.append(replace(group, layers=others, share=self.upper))
        return found

    def after(self) -> OneShot | None:
        """The part that evicts from what goes on."""
        if not self.then:
            return None
        part: Any = find("sparsity", self.then)
        if not issubclass(part, OneShot):
            raise ConfigError(
                f"sparsity {self.name!r}: then={self.then} must be a part that evicts after the "
                f"prompt, as sage-kv or snapkv"
            )
        return cast(OneShot, part(self.stays or self.budget // 2))

    def keep(self, group: GroupSpec, n_layers: int) -> Keep | None:
        """See `Sparsity`: of the prompt that goes on."""
        part = self.after()
        return None if part is None else part.keep(group, n_layers)

    def filter(self, n_layers: int) -> Filter:
        """See `Sparsity`."""
        layer = round(self.depth * n_layers) if self.layer == -1 else self.layer
        if not 0 <= layer < n_layers:
            raise ConfigError(
                f"sparsity {self.name!r}: layer={self.layer} is outside the model's layers, 0 to "
                f"{n_layers - 1}"
            )
        return Filter(layer + 1, self.budget, self.sinks, self.recent)

    def check(self, page_size: int, groups: int) -> None:
        """See `Sparsity`."""
        if self.sinks < 0 or self.recent < 1:
            raise ConfigError(
                f"sparsity {self.name!r}: sinks={self.sinks} must be 0 or more and "
                f"recent={self.recent} at least 1: the prompt's last token goes on"
            )
        least = self.sinks + self.recent + 1
        if self.budget < least:
            raise ConfigError(
                f"sparsity {self.name!r}: budget={self.budget} is below sinks + recent + 1 = "
                f"{least}; raise budget, or lower sinks={self.sinks} and recent={self.recent}"
            )
        part = self.after()
        if part is not None:
            part.check(page_size, groups)
        elif self.stays:
            raise ConfigError(
                f"sparsity {self.name!r}: stays={self.stays} is the budget of a part that evicts: "
                f"name one, as then=snapkv, or leave it out"
            )
        if not 0 < self.upper <= 1:
            raise ConfigError(
                f"sparsity {self.name!r}: upper={self.upper:g} must be above 0 and at most 1"
            )

    def score(self, q: "Tensor", k: "Tensor") -> "Tensor":
        """How much each position matters to the last: [L] fp32, of q [Hq, d] and k [L, Hkv, d].

        Linear in q and k: ranks that hold a part of the heads each add theirs up.
        """
        raise NotImplementedError
