"""Block ids of prompts that are put together from pieces of content."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from kvarn.core.errors import ConfigError

#: (what it is, its length [tokens]): equal names mean equal content
Piece = tuple[Hashable, int]


@dataclass(slots=True)
class Chains:
    """Numbers blocks in order of first sight, so that equal ids mean equal whole prefixes.

    A block is known by the block before it and by the parts of pieces in it. A partial last block
    is numbered like the others: by what it holds.
    """

    block_size: int  #: [tokens]
    _ids: dict[Hashable, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, got {self.block_size}")

    def blocks(self, pieces: Sequence[Piece]) -> tuple[int, ...]:
        """Ids of ceil(length / block_size) blocks of the prompt that the pieces make."""
        found: list[int] = []
        block: list[tuple[Hashable, int, int]] = []  # (piece, from, to)
        room = self.block_size
        for name, length in pieces:
            start = 0
            while start < length:
                end = min(length, start + room)
                block.append((name, start, end))
                room -= end - start
                start = end
                if not room:
                    found.append(self._id(found, block))
                    block, room = [], self.block_size
        if block:
            found.append(self._id(found, block))
        return tuple(found)

    def _id(self, before: list[int], block: list[tuple[Hashable, int, int]]) -> int:
        key = (before[-1] if before else None, tuple(block))
        return self._ids.setdefault(key, len(self._ids))


def length(pieces: Sequence[Piece]) -> int:
    """Tokens of all pieces."""
    return sum(n for _, n in pieces)
