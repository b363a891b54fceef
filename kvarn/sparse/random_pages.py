"""Pages at random: what any selection has to beat at the same number of pages."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.sparse.part import Pages, Selector

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class RandomPages(Selector):
    """Pages by lot: others for each row, layer and KV head, the same in every run."""

    name: ClassVar[str] = "random-pages"
    regime: ClassVar[str] = "the baseline of every table of selections; never useful"

    seed: int = 0

    def select(self, pages: Pages) -> "Tensor":
        """Reproducible lots, as those of `kvarn.sparse.random`."""
        (rows, count), heads = pages.table.shape, pages.sketch.shape[1]
        ones = pages.sketch.new_ones(rows, heads, count).double()
        x = ones.cumsum(2) * 12.9898 + ones.cumsum(1) * 78.233 + (pages.layer + 1) * 37.719
        x = x + self.seed * 4.1414 + pages.positions.double()[:, None, None] * 0.7713
        return (x.sin() * 43758.5453).remainder(1.0).float()
