"""Heavy hitters: keep what all rows of the prompt attended to most, summed up (arXiv 2306.14048).

The sums are made block by block beside the prompt's own attention, so no L x L matrix exists, but
its products are done twice. Without `every` the hitters are chosen once, when the prompt is whole,
and what is generated goes through the ring of recent positions. With `every` the sums go on while
it generates, over what is held, and each so many steps they choose among all of it (section 4.2;
`every=1` is the paper's, which drops one position at every step); half of what stays is the newest.

Regime: a baseline. Sums favour early positions, which more rows can see. With `every` each step is
watched: on a GPU none is replayed from a captured graph.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.core.keep import ENDLESS, Keep
from kvarn.core.model import GroupSpec
from kvarn.sparse.folding import Folding
from kvarn.sparse.mass import attention_mass
from kvarn.sparse.part import Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class H2O(Folding):
    """What all rows attend to, and recent positions."""

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "2306.14048"
    regime: ClassVar[str] = "a baseline: sums favour early positions; no prefix hits, dear prefill"
    watch: ClassVar[int] = ENDLESS
    newest: ClassVar[float] = 0.5

    sinks: int = 0

    def keep(self, group: GroupSpec, n_layers: int) -> Keep | None:
        """See `Sparsity`: half of the budget is recent, as in the paper."""
        if self.every:
            return Folding.keep(self, group, n_layers)
        return Keep(self.budget, self.recent or self.budget // 2, self.watch)

    @property
    def sums(self) -> bool:
        """See `OneShot`."""
        return self.every > 0

    def observe(self, q: "Tensor", k: "Tensor", start: int) -> "Tensor":
        """See `OneShot`."""
        return attention_mass(q, k, start)

    def score(self, prompt: Prompt) -> "Tensor":
        """See `OneShot`."""
        assert prompt.mass is not None
        return prompt.mass
