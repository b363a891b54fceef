"""Key norms: keep the positions whose keys are short (arXiv 2406.11430).

Needs no queries at all: keys of small L2 norm tend to be those that are attended to.

Regime: a baseline that costs nothing; blind to the question.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.sparse.part import OneShot, Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class KNorm(OneShot):
    """Sinks, the positions of the shortest keys, and a ring of recent positions."""

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "2406.11430"
    regime: ClassVar[str] = "a baseline that needs no queries; blind to the question"

    def score(self, prompt: Prompt) -> "Tensor":
        """See `OneShot`."""
        lengths: Tensor = prompt.k.float().norm(dim=-1)
        return -lengths.T
