"""Which cached prefix goes first: one function, `utility(node, now)`; the lowest goes."""

from typing import Protocol

from kvarn.kv.prefix import Node


class Evict(Protocol):
    """Parts of kind "evict"."""

    def utility(self, node: Node, now: float) -> float:
        """Worth of keeping `node`; may only grow while the node is idle [any unit]."""
        ...
