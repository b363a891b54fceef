"""Attention sinks and a sliding window (StreamingLLM, arXiv 2309.17453, sections 3.1 and 3.2).

Keeps the first `sinks` positions and a ring of the last `window`, whatever they say. A prompt that
is longer is computed whole and then drops its middle; with `streamed` it goes through the ring
position by position, as text that never ends would.

Positions count inside the cache: a query sees the sinks as if the middle had never been, so no
distance exceeds the budget. Recent keys stay as they are stored; the sinks' are turned along.

Regime: endless chats and logs whose middle is never asked for. Nothing can be recalled from it.
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
class StreamingLLM(OneShot):
    """Attention sinks plus a sliding window."""

    name: ClassVar[str] = "streamingllm"
    paper: ClassVar[str] = "2309.17453"
    regime: ClassVar[str] = "endless streams whose middle is never asked for; recalls nothing of it"

    sinks: int = 4
    positions: str = "cache"  #: of the sinks, as the query sees them: in the cache, or in the text
    streamed: bool = False  #: the prompt too goes through the ring

    def keep(self, group: GroupSpec, n_layers: int) -> Keep:
        """See `Sparsity`: all but the sinks is recent."""
        return Keep(self.budget, self.budget - self.sinks, 0, self.turns, self.streamed)

    @property
    def turns(self) -> bool:
        """Whether the sinks move along with the query."""
        return self.positions == "cache" and self.sinks > 0

    def check(self, page_size: int, groups: int) -> None:
        """See `Sparsity`."""
        if self.positions not in ("cache", "text"):
            raise ConfigError(
                f"sparsity 'streamingllm': positions={self.positions!r} must be cache or text"
            )
        if not 0 <= self.sinks < self.budget or self.recent:
            raise ConfigError(
                f"sparsity 'streamingllm': budget={self.budget} is sinks={self.sinks} and a window "
                f"of the rest, at least 1; recent={self.recent} follows from them and must be 0"
            )

    def score(self, prompt: Prompt) -> "Tensor":
        """Nothing of the middle is chosen: the budget is sinks and window."""
        length, heads, _ = prompt.k.shape
        return prompt.k.new_zeros(heads, length).float()
