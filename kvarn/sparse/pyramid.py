"""Budgets by depth: early layers keep more, late ones less (PyramidKV, arXiv 2406.02069).

Attention of early layers is spread over the whole context and narrows with depth, so a fixed sum of
budgets is spent better at the bottom. Here the layers form `steps` table groups of equal height,
whose budgets fall linearly with depth around `budget`; what stays in each is chosen by another
part, `of`. Each group has pages of its own, so what late layers let go is free for late layers.

Regime: as the part that chooses. Groups cost a page table and a plan each at every step.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from kvarn.core.errors import ConfigError
from kvarn.core.keep import Keep
from kvarn.core.model import GroupSpec
from kvarn.core.part import find
from kvarn.sparse.part import OneShot, Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class Pyramid(OneShot):
    """Another part with budgets that fall with depth."""

    name: ClassVar[str] = "pyramid"
    paper: ClassVar[str] = "2406.02069"
    regime: ClassVar[str] = "as the part that chooses; wins where early layers look farther around"

    of: str = "snapkv"  #: the part that chooses what stays
    steps: int = 4  #: table groups
    least: float = 0.5  #: budget of the deepest group, as a share of the mean

    def split(self, groups: list[GroupSpec]) -> list[GroupSpec]:
        """See `Sparsity`."""
        if len(groups) > 1 or len(groups[0].layers) < self.steps:
            return groups  # `check` has the words for it
        layers, count = groups[0].layers, len(groups[0].layers)
        edges = [count * i // self.steps for i in range(self.steps + 1)]
        one = groups[0]
        return [
            GroupSpec(layers[a:b], one.n_kv_heads, one.head_dim, one.window)
            for a, b in pairwise(edges)
        ]

    def keep(self, group: GroupSpec, n_layers: int) -> Keep:
        """See `Sparsity`: `of`'s rule with the budget of this depth."""
        depth = (group.layers[0] + group.layers[-1]) / 2 / max(1, n_layers - 1)  # 0 to 1
        budget = round(self.budget * (2 - self.least + 2 * (self.least - 1) * depth))
        return Keep(budget, self.recent or budget // 4, self._part.watch)

    def check(self, page_size: int, groups: int) -> None:
        """See `Sparsity`."""
        if self.steps < 2 or not 0 < self.least <= 1:
            raise ConfigError(
                f"sparsity 'pyramid': steps={self.steps} must be at least 2 and "
                f"least={self.least:g} above 0 and at most 1"
            )
        if groups != self.steps:
            raise ConfigError(
                f"sparsity 'pyramid' needs layers in steps={self.steps} table groups, and here "
                f"are {groups}: name it as the engine's own part, on a model with as many layers"
            )
        smallest = type(self._part)(round(self.budget * self.least), self.sinks, self.recent)
        smallest.check(page_size, groups)

    def observe(self, q: "Tensor", k: "Tensor", start: int) -> "Tensor":
        """See `OneShot`."""
        return self._part.observe(q, k, start)

    def score(self, prompt: Prompt) -> "Tensor":
        """See `OneShot`."""
        return self._part.score(prompt)

    @property
    def _part(self) -> OneShot:
        part = find("sparsity", self.of)
        if not issubclass(part, OneShot) or part is Pyramid:
            raise ConfigError(f"sparsity 'pyramid' cannot be of {self.of!r}, which scores nothing")
        return part(self.budget, self.sinks, self.recent)
