"""Least recently used: the plain default of every engine."""

from kvarn.core.part import Part
from kvarn.kv.prefix import Node


class LRU(Part):
    """Keep what was used last."""

    name, kind = "lru", "evict"
    regime = "Most traffic. Loses on scans larger than the cache, which flush everything."

    def utility(self, node: Node, now: float) -> float:
        """Time of the last use [s]."""
        return node.last_used
