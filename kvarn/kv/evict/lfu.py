"""Least frequently used, ties by recency."""

from kvarn.core.part import Part
from kvarn.kv.prefix import Node


class LFU(Part):
    """Keep what was hit most often (system prompts survive scans)."""

    name, kind = "lfu", "evict"
    regime = "A few hot prefixes among one-time prompts. Loses when popularity drifts."

    def utility(self, node: Node, now: float) -> float:
        """Number of hits; the last use [s] orders equal counts (a time never reaches 1e12 s)."""
        return node.hits + node.last_used * 1e-12
