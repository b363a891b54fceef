"""Choosing again while generating: with `every`, each so many steps among all that is held.

The last `every` slots are a ring that is never written over: when it is full, what stays of all
slots moves to the first ones. A share of what stays is the newest, whatever the scores say.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvarn.core.errors import ConfigError
from kvarn.core.keep import Keep
from kvarn.core.model import GroupSpec
from kvarn.sparse.part import OneShot


@dataclass(slots=True, frozen=True)
class Folding(OneShot):
    """A part that can choose again. Fields of the subclasses are their options."""

    every: int = 0  #: steps between choices, whose positions the budget includes; 0: one choice

    newest: ClassVar[float] = 0.25

    def keep(self, group: GroupSpec, n_layers: int) -> Keep | None:
        """See `Sparsity`."""
        if self.every:
            return Keep(self.budget, self.every, self.watch, folds=True)
        return OneShot.keep(self, group, n_layers)

    def check(self, page_size: int, groups: int) -> None:
        """See `Sparsity`."""
        OneShot.check(self, page_size, groups)
        if self.every < 0 or (self.every and (self.recent or self.budget - self.every < 4)):
            raise ConfigError(
                f"sparsity {self.name!r}: every={self.every} must be 0 or more, at least 4 below "
                f"budget={self.budget}, and without recent={self.recent}"
            )
        held = self.budget - self.every
        if self.every and held < self.sinks + max(1, int(held * self.newest)):
            raise ConfigError(
                f"sparsity {self.name!r}: of budget={self.budget} every={self.every} leaves no "
                f"more than sinks={self.sinks} and the newest, {self.newest:g} of the rest; raise "
                f"budget or lower one of them"
            )
