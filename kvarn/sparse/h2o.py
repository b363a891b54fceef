"""Heavy hitters: keep what all rows of the prompt attended to most, summed up (arXiv 2306.14048).

The paper goes on summing while it generates; here the hitters are chosen once, when the prompt is
whole, and what is generated goes through the ring of recent positions. The sums are made block by
block beside the prompt's own attention, so no L x L matrix exists, but its products are done twice.

Regime: a baseline. Sums favour early positions, which more rows can see.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.core.keep import ENDLESS, Keep
from kvarn.core.model import GroupSpec
from kvarn.sparse.mass import attention_mass
from kvarn.sparse.part import OneShot, Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class H2O(OneShot):
    """What the whole prompt attends to, and a ring of recent positions."""

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "2306.14048"
    regime: ClassVar[str] = "a baseline: sums favour early positions; no prefix hits, dear prefill"
    watch: ClassVar[int] = ENDLESS

    sinks: int = 0

    def keep(self, group: GroupSpec, n_layers: int) -> Keep:
        """See `Sparsity`: half of the budget is recent, as in the paper."""
        return Keep(self.budget, self.recent or self.budget // 2, self.watch)

    def observe(self, q: "Tensor", k: "Tensor", start: int) -> "Tensor":
        """See `OneShot`."""
        return attention_mass(q, k, start)

    def score(self, prompt: Prompt) -> "Tensor":
        """See `OneShot`."""
        assert prompt.mass is not None
        return prompt.mass
