"""SnapKV: eviction after prefill by the attention of an observation window (arXiv 2404.14469).

The last `watch` rows of the prompt vote for what stays; the votes are pooled over neighbouring
positions, so that what stands around an important token stays with it.

Regime: as SAGE-KV; steadier where the last token alone says little, and dearer by the window.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.sparse.mass import attention_mass
from kvarn.sparse.part import OneShot, Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class SnapKV(OneShot):
    """Sinks, what the last 32 rows attend to, pooled, and a ring of recent positions."""

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "2404.14469"
    regime: ClassVar[str] = "one question after a long prompt; later questions lose recall"
    watch: ClassVar[int] = 32

    pool: int = 7  #: positions that a vote counts for, odd (the paper's kernel size)

    def observe(self, q: "Tensor", k: "Tensor", start: int) -> "Tensor":
        """See `OneShot`."""
        return attention_mass(q, k, start)

    def score(self, prompt: Prompt) -> "Tensor":
        """Largest vote among the neighbours."""
        assert prompt.mass is not None
        heads, length = prompt.mass.shape
        wide = prompt.mass.new_zeros(heads, length + self.pool - 1)
        wide[:, self.pool // 2 : self.pool // 2 + length] = prompt.mass
        return wide.unfold(1, self.pool, 1).amax(-1)
