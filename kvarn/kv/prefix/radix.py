"""Prefix index as a radix tree: a node holds a run of pages, split where contents part.

(RadixAttention, SGLang, arXiv 2312.07104, section 3.) Runs are whole pages here, and sequences
enter what they compute as soon as a step is planned, not only when they end.
"""

from collections.abc import Sequence

from kvarn.core.plan import PageId
from kvarn.kv.prefix import Node
from kvarn.kv.prefix.tree import PrefixTree


class Radix(PrefixTree):
    """Few nodes for long shared runs; a leaf grows in place while one sequence extends it."""

    name, paper = "radix", "2312.07104"
    regime = "Trees of long prompts: few nodes. A match compares tokens, so it costs O(prompt)."

    def insert(
        self, at: Node, tokens: Sequence[int], pages: list[list[PageId]], now: float
    ) -> Node | None:
        """Enter a run of whole pages below `at`; extend `at` itself where that is safe."""
        run = tuple(tokens)
        key = run[: self.page_size]
        if key in at.children:
            return None
        if at.parent is not None and not at.children and at.users == 1:
            # the only user is the sequence that inserts: grow its run instead of a chain of nodes
            at.tokens += run
            for mine, new in zip(at.pages, pages):
                mine += new
            self._remember(at)
            at.last_used = now
            return at
        return self._add(at, key, run, [list(group) for group in pages], now)

    def _walk(self, root: Node, tokens: Sequence[int], limit: int) -> list[Node]:
        path, node, size = [root], root, self.page_size
        start, end = 0, min(limit, len(tokens) // size) * size
        while start < end:
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            path.append(child)
            run = len(child.tokens)
            if child.tokens[: end - start] != tuple(tokens[start : min(end, start + run)]):
                break
            start += run
            node = child
        return path

    def _agreeing(self, path: list[Node], tokens: Sequence[int]) -> int:
        """Runs before the last agree whole; the last page by page."""
        size = self.page_size
        start = sum(len(node.tokens) for node in path[:-1])
        agreeing = start // size
        run = path[-1].tokens
        for at in range(0, len(run), size):
            if run[at : at + size] != tuple(tokens[start + at : start + at + size]):
                break
            agreeing += 1
        return agreeing

    def _cut(self, node: Node, keep: int) -> Node:
        """Split a run after `keep` pages; `node` stays the lower part, with its users."""
        size = self.page_size
        parent = node.parent
        assert parent is not None
        upper = Node(
            node.tokens[: keep * size],
            [pages[:keep] for pages in node.pages],
            parent,
            node.key,
            hits=node.hits,
            last_used=node.last_used,
        )
        parent.children[node.key] = upper
        node.tokens = node.tokens[keep * size :]
        node.pages = [pages[keep:] for pages in node.pages]
        node.parent, node.key = upper, node.tokens[:size]
        upper.children[node.key] = node
        self._remember(upper)
        return upper
