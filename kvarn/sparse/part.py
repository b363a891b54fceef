"""`Sparsity`, the seam of eviction: a part defines the hooks that it has.

- `keep`, on append: how many positions stay and where the next go, plain numbers that are known
  before anything runs; `split`: the table groups that this needs.
- `observe`: what rows of the prompt say, as they are computed.
- `score`, after prefill: what of a whole prompt stays, by layer and KV head.

Numbers are decided on the left (`keep`: so the simulator admits as the engine does), contents on
the right (`observe`, `score`), on tensors whose methods are all that is used here.

Shapes: q [t, Hq, d] and k [L, Hkv, d] of one layer and one sequence, rotated as cached.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.core.errors import ConfigError
from kvarn.core.keep import Keep
from kvarn.core.model import GroupSpec
from kvarn.core.part import Cap, Part

if TYPE_CHECKING:
    from torch import Tensor


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

    def split(self, groups: list[GroupSpec]) -> list[GroupSpec]:
        """The table groups that it wants, of those of the model."""
        return groups

    def keep(self, group: GroupSpec, n_layers: int) -> Keep | None:
        """The rule of a sequence in `group` of a model of `n_layers`; None: everything stays."""
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

    @property
    def turns(self) -> bool:
        """Whether queries see the sinks at their place in the cache, not in the text."""
        return False

    def keep(self, group: GroupSpec, n_layers: int) -> Keep:
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
