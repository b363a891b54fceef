"""Prefix index by hash-chained pages: one node a page, found by the hash of everything before it.

The id of a page's content is a stable 128-bit hash of its parent's id and its own tokens, so it
means the same in every process (routers and stores speak of content by these ids). Tokens are
compared on a hit: a collision costs a miss, never a wrong answer. (vLLM's automatic prefix caching;
arXiv 2309.06180 for the paging.)
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from kvarn.core.plan import PageId
from kvarn.kv.prefix import Node
from kvarn.kv.prefix.tree import PrefixTree


class HashChain(PrefixTree):
    """One dictionary step a page: O(pages of the prompt), whatever the cache holds."""

    name, paper = "hash", "2309.06180"
    regime = (
        "The default: cheap and flat. Loses to radix on memory per cached token (a node a page)."
    )

    def insert(
        self, at: Node, tokens: Sequence[int], pages: list[list[PageId]], now: float
    ) -> Node | None:
        """Enter whole pages below `at`, one node each."""
        node, size = at, self.page_size
        for page in range(len(tokens) // size):
            run = tuple(tokens[page * size : (page + 1) * size])
            key = content_id(node.key, run)
            if key in node.children:
                return None
            node = self._add(node, key, run, [[group[page]] for group in pages], now)
        return node

    def _walk(self, root: Node, tokens: Sequence[int], limit: int) -> list[Node]:
        path, node, size = [root], root, self.page_size
        for start in range(0, min(limit, len(tokens) // size) * size, size):
            if not node.children:
                break
            run = tuple(tokens[start : start + size])
            child = node.children.get(content_id(node.key, run))
            if child is None or child.tokens != run:
                break
            path.append(child)
            node = child
        return path

    def _agreeing(self, path: list[Node], tokens: Sequence[int]) -> int:
        return len(path) - 1


def content_id(parent: bytes | str, tokens: Sequence[int]) -> bytes:
    """Stable id of a page's content: its tokens after everything that `parent` stands for.

    `parent` is the id of the page before, or the salt (text) at the start of a sequence.
    """
    before = (
        parent if isinstance(parent, bytes) else blake2b(parent.encode(), digest_size=16).digest()
    )
    return blake2b(array("q", tokens).tobytes(), digest_size=16, key=before).digest()
