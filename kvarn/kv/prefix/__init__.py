"""Prefix indexes: which cached pages hold the KV of a token prefix.

Both indexes are trees of `Node`s; a node holds a run of whole pages in every KV group. A sequence
*pins* the deepest node it uses, and since only leaves are evicted, that protects its whole path:
one operation, however long the prefix. Content is entered when a step that computes it is
*planned*: steps run in order and a layer writes all K and V before any row attends, so a sequence
of the same step may already share it. That is how requests that arrive together share a prefix.

Groups with a sliding window give pages back while the sequence runs; a node may thus lack pages in
such a group (`-1`), and a match only ends where the window before it is complete.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvarn.core.plan import PageId

NO_PAGE = -1


@dataclass(slots=True, eq=False)
class Node:
    """A run of whole pages of one content, below the content of `parent`."""

    tokens: tuple[int, ...]  #: len is a multiple of the page size; () for a root
    pages: list[list[PageId]]  #: by group, one id a page; NO_PAGE where the page was given back
    parent: "Node | None"
    key: Any = None  #: how the index finds it below its parent
    children: dict[Any, "Node"] = field(default_factory=dict)
    users: int = 0  #: sequences whose deepest node this is
    hits: int = 0  #: matches that used it
    last_used: float = 0.0  #: [s]
    alive: bool = True  #: False once evicted


@dataclass(slots=True)
class Match:
    """The longest usable cached prefix; nothing is held until `take`."""

    path: list[Node]  #: from the root down
    length: int  #: usable pages (a run may reach beyond: `take` cuts there)
    pages: list[list[PageId]]  #: by group, `length` entries


class PrefixIndex(Protocol):
    """Parts of kind "prefix". Token runs handed in are whole pages."""

    page_size: int

    def match(self, tokens: Sequence[int], salt: str, limit: int) -> Match:
        """Longest cached prefix of at most `limit` pages, every window before its end whole."""
        ...

    def take(self, match: Match, now: float) -> Node:
        """Use what was matched: count the hit and pin the node where it ends."""
        ...

    def insert(
        self, at: Node, tokens: Sequence[int], pages: list[list[PageId]], now: float
    ) -> Node | None:
        """Enter whole pages below `at`; the new deepest node, or None if that content is there."""
        ...

    def pin(self, node: Node) -> None:
        """Protect the path to `node` from eviction."""
        ...

    def unpin(self, node: Node, now: float) -> None:
        """Undo one `pin` (or `take`)."""
        ...

    def evict(self, count: int, now: float) -> list[list[PageId]]:
        """Give up at least `count` pages of the full-attention groups; the freed ids by group."""
        ...

    def forget(self, group: int, page: PageId) -> None:
        """A page of a window group was taken back; matches that need it end earlier."""
        ...

    def nodes(self) -> list[Node]:
        """Every node but the roots."""
        ...
