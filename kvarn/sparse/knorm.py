"""Key norms: keep the positions whose keys are short (arXiv 2406.11430).

Needs no queries at all: keys of small L2 norm tend to be those that are attended to. So it can
choose again while it generates: with `every`, each so many steps among all that is held, what was
generated included; a quarter of what stays is the newest.

Regime: a baseline that costs nothing; blind to the question. `every` for outputs longer than the
budget.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.core.errors import ConfigError
from kvarn.core.keep import Keep
from kvarn.core.model import GroupSpec
from kvarn.sparse.part import OneShot, Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class KNorm(OneShot):
    """Sinks, the positions of the shortest keys, and a ring of recent positions."""

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "2406.11430"
    regime: ClassVar[str] = "a baseline that needs no queries; blind to the question"

    every: int = 0  #: steps between choices, whose positions the budget includes; 0: one choice

    def keep(self, group: GroupSpec, n_layers: int) -> Keep | None:
        """See `Sparsity`."""
        if self.every:
            return Keep(self.budget, self.every, folds=True)
        return OneShot.keep(self, group, n_layers)

    def check(self, page_size: int, groups: int) -> None:
        """See `Sparsity`."""
        OneShot.check(self, page_size, groups)
        if self.every < 0 or (self.every and (self.recent or self.budget - self.every < 4)):
            raise ConfigError(
                f"sparsity 'knorm': every={self.every} must be 0 or more, at least 4 below "
                f"budget={self.budget}, and without recent={self.recent}"
            )
        if self.every and self.budget - self.every <= self.sinks:
            raise ConfigError(
                f"sparsity 'knorm': of budget={self.budget} every={self.every} leaves no more than "
                f"sinks={self.sinks}; raise budget or lower one of them"
            )

    def score(self, prompt: Prompt) -> "Tensor":
        """See `OneShot`."""
        lengths: Tensor = prompt.k.float().norm(dim=-1)
        return -lengths.T
