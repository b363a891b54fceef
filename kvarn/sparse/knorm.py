"""Key norms: keep the positions whose keys are short (arXiv 2406.11430).

Needs no queries at all: keys of small L2 norm tend to be those that are attended to. So it can
choose again while it generates: with `every`, each so many steps among all that is held, what was
generated included; a quarter of what stays is the newest.

Regime: a baseline that costs nothing; blind to the question. `every` for outputs longer than the
budget.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.sparse.folding import Folding
from kvarn.sparse.part import Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class KNorm(Folding):
    """Sinks, the positions of the shortest keys, and a ring of recent positions."""

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "2406.11430"
    regime: ClassVar[str] = "a baseline that needs no queries; blind to the question"

    def score(self, prompt: Prompt) -> "Tensor":
        """See `OneShot`."""
        lengths: Tensor = prompt.k.float().norm(dim=-1)
        return -lengths.T
