"""What both prefix indexes share: roots, pins, window holes, and eviction leaf by leaf."""

import heapq
from collections.abc import Sequence
from itertools import count
from typing import Any

from kvarn.core.part import Cap, Part
from kvarn.core.plan import PageId
from kvarn.kv.evict import Evict
from kvarn.kv.prefix import NO_PAGE, Match, Node


class PrefixTree(Part):
    """Base of the prefix indexes; subclasses find and enter content (`_walk`, `insert`)."""

    kind = "prefix"
    needs = frozenset({Cap.PAGED_KV})
    gives = frozenset({Cap.PREFIX_SHARING})

    def __init__(
        self,
        page_size: int,
        windows: Sequence[int | None],
        evict: Evict,
        sinks: Sequence[int] = (),
    ) -> None:
        """`sinks`: leading pages of each group that are seen beside its window; (): none."""
        self.page_size = page_size
        self.windows = list(windows)  #: by group
        self.sinks = list(sinks) or [0] * len(self.windows)
        self.policy = evict
        self._roots: dict[str, Node] = {}
        self._where: dict[tuple[int, PageId], Node] = {}  # (window group, page) -> node
        self._heap: list[tuple[float, int, Node]] = []  # leaves that may go, by utility when pushed
        self._tick = count()

    def nodes(self) -> list[Node]:
        """Every node but the roots."""
        found: list[Node] = []
        stack = list(self._roots.values())
        while stack:
            children = list(stack.pop().children.values())
            found += children
            stack += children
        return found

    def match(self, tokens: Sequence[int], salt: str, limit: int) -> Match:
        """Longest cached prefix of at most `limit` pages, every window before its end whole."""
        path = self._walk(self._root(salt), tokens, limit)
        agreeing = min(limit, self._agreeing(path, tokens))
        pages = [
            [page for node in path for page in node.pages[group]][:agreeing]
            for group in range(len(self.windows))
        ]
        length = self._usable(pages)
        return Match(path, length, [group_pages[:length] for group_pages in pages])

    def take(self, match: Match, now: float) -> Node:
        """Use what was matched: count the hit and pin the node where it ends."""
        node, covered = match.path[0], 0
        for step in match.path[1:]:
            if covered >= match.length:
                break
            run = len(step.tokens) // self.page_size
            node = (
                step if covered + run <= match.length else self._cut(step, match.length - covered)
            )
            covered += run
            node.hits += 1
            node.last_used = now
        node.users += 1
        return node

    def pin(self, node: Node) -> None:
        """Protect the path to `node` from eviction."""
        node.users += 1

    def unpin(self, node: Node, now: float) -> None:
        """Undo one `pin` (or `take`)."""
        node.users -= 1
        node.last_used = now
        self._offer(node)

    def evict(self, count: int, now: float) -> list[list[PageId]]:
        """Give up at least `count` pages of each full-attention group, worst leaf's tail first."""
        freed: list[list[PageId]] = [[] for _ in self.windows]
        left = count
        while left > 0 and self._heap:
            utility, _, node = heapq.heappop(self._heap)
            if not self._may_go(node):
                continue
            current = self.policy.utility(node, now)
            if current > utility:  # it was used since: back in line
                heapq.heappush(self._heap, (current, next(self._tick), node))
                continue
            left -= self._trim(node, left, freed)
            self._offer(node)
        return freed

    def forget(self, group: int, page: PageId) -> None:
        """A page of a window group was taken back; matches that need it end earlier."""
        node = self._where.pop((group, page))
        node.pages[group][node.pages[group].index(page)] = NO_PAGE
        self._offer(node)

    # what a subclass brings: `insert`, and

    def _walk(self, root: Node, tokens: Sequence[int], limit: int) -> list[Node]:
        """Nodes from the root down along `tokens`; the last one may agree only in part."""
        raise NotImplementedError

    def _agreeing(self, path: list[Node], tokens: Sequence[int]) -> int:
        """Pages of the path that agree with `tokens`."""
        raise NotImplementedError

    def _cut(self, node: Node, keep: int) -> Node:
        """Split a run after `keep` pages; the upper part. Never asked where nodes hold one page."""
        raise NotImplementedError

    # shared machinery

    def _root(self, salt: str) -> Node:
        if salt not in self._roots:
            self._roots[salt] = Node((), [[] for _ in self.windows], None, key=salt)
        return self._roots[salt]

    def _add(
        self, parent: Node, key: Any, tokens: tuple[int, ...], pages: list[list[PageId]], now: float
    ) -> Node:
        node = Node(tokens, pages, parent, key, last_used=now)
        parent.children[key] = node
        self._remember(node)
        return node

    def _remember(self, node: Node) -> None:
        """Note which node holds each page of the window groups."""
        for group, window in enumerate(self.windows):
            if window is not None:
                for page in node.pages[group]:
                    if page != NO_PAGE:
                        self._where[group, page] = node

    def _may_go(self, node: Node) -> bool:
        return node.alive and not node.users and not node.children

    def _offer(self, node: Node) -> None:
        """Put `node` in line for eviction if it may go; drop it at once if it holds nothing."""
        if not self._may_go(node):
            return
        if all(page == NO_PAGE for pages in node.pages for page in pages):
            self._remove(node)
            return
        utility = self.policy.utility(node, node.last_used)
        heapq.heappush(self._heap, (utility, next(self._tick), node))

    def _trim(self, node: Node, most: int, freed: list[list[PageId]]) -> int:
        """Free up to `most` pages from the end of a leaf; the number of positions given up."""
        have = len(node.tokens) // self.page_size
        keep = max(0, have - most)
        for group, pages in enumerate(node.pages):
            for page in pages[keep:]:
                if page != NO_PAGE:
                    freed[group].append(page)
                    self._where.pop((group, page), None)
            del pages[keep:]
        node.tokens = node.tokens[: keep * self.page_size]
        return have - keep

    def _remove(self, node: Node) -> None:
        """Take an empty leaf out of the tree; its parent may now be in line."""
        node.alive = False
        if node.parent is None:
            del self._roots[node.key]
            return
        del node.parent.children[node.key]
        node.parent.last_used = max(node.parent.last_used, node.last_used)
        self._offer(node.parent)

    def _usable(self, pages: list[list[PageId]]) -> int:
        """Longest run of leading pages whose end has every window before it whole, and sinks."""
        length, before = len(pages[0]), -1
        while length != before:  # what one group shortens, another one may have to shorten more
            before = length
            for group, window in enumerate(self.windows):
                if window is not None:
                    length = self._seen(pages[group][:length], window, self.sinks[group])
        return length

    def _seen(self, pages: list[PageId], window: int, sinks: int) -> int:
        """The same of one group with a window."""
        length = len(pages)
        if NO_PAGE in pages[:sinks]:
            length = pages.index(NO_PAGE)
        needed = -(-(window - 1) // self.page_size)  # the next query sees window - 1 positions
        while length and NO_PAGE in pages[max(0, length - needed) : length]:
            length -= 1
        return length
