"""Positions at random: what any policy has to beat at the same budget."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.sparse.part import OneShot, Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class Random(OneShot):
    """Sinks, positions by lot (others for each head and layer), and a ring of recent positions."""

    name: ClassVar[str] = "random"
    regime: ClassVar[str] = "the baseline of every table; never useful"

    seed: int = 0

    def score(self, prompt: Prompt) -> "Tensor":
        """Reproducible lots: the fraction of sin(x) * 43758.5453, a common hash of graphics."""
        length, heads, _ = prompt.k.shape
        at = prompt.k.new_ones(heads, length).double().cumsum(1)
        head = prompt.k.new_ones(heads, length).double().cumsum(0)
        x = at * 12.9898 + head * 78.233 + (prompt.layer + 1) * 37.719 + self.seed * 4.1414
        return (x.sin() * 43758.5453).remainder(1.0).float()
