"""Which simulated drafts stand: a probability by place in the draft, and a draw by position.

The number drawn for a position of a sequence depends on the seed, the request and the position
alone. Two simulations of the same requests so meet the same luck, whatever else differs, and what
is easy for a drafter stays easy for one that accepts more.
"""

from dataclasses import dataclass, field
from typing import Protocol
from zlib import crc32

from kvarn.core.plan import SeqId
from kvarn.core.seq import Seq

_MASK = (1 << 64) - 1


class Acceptance(Protocol):
    """How good the drafts are."""

    def share(self, seq: Seq, place: int) -> float:
        """Probability that token number `place` (from 0) of a draft stands, if those before do."""
        ...


@dataclass(slots=True, frozen=True)
class Stated:
    """The same for all requests and for ever; the last share holds for all further places."""

    shares: tuple[float, ...]

    def share(self, seq: Seq, place: int) -> float:
        """See `Acceptance`."""
        return self.shares[min(place, len(self.shares) - 1)]


@dataclass(slots=True)
class Luck:
    """Uniform numbers in [0, 1) by sequence and position; no two positions share one."""

    seed: int = 0
    _keys: dict[SeqId, int] = field(default_factory=dict)

    def at(self, seq: Seq, position: int) -> float:
        """The number of a position [tokens from the start of the sequence]."""
        key = self._keys.get(seq.id)
        if key is None:
            text = f"{self.seed} {seq.index} {seq.request.id}"
            key = self._keys[seq.id] = crc32(text.encode()) << 24
        return _mixed(key + position) / 2.0**64

    def forget(self, seq: SeqId) -> None:
        """The sequence has ended."""
        self._keys.pop(seq, None)


def _mixed(x: int) -> int:
    """SplitMix64: neighbours come out unlike."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
