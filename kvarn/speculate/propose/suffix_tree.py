"""A counted suffix tree over many token sequences, limited in depth (arXiv 2411.04975, section 3).

Every run of at most `depth` tokens of every sequence is a path from the root, and a node's count is
the number of places where its path occurs. Edges are compressed: a label is a stretch of a
sequence's text. Appending a token moves the open suffixes of that sequence (at most `depth`), each
of which ends exactly at a node; removing a sequence takes its suffixes out again.

Costs, in node steps: append up to `depth`, removal up to `depth` a token, match a walk of the path.
Nodes: at most two a token. Texts of removed sequences live while a label refers to them; labels
move to the latest sequence that passes, so under first-in-first-out removal few do.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import floor

from kvarn.core.errors import ConfigError


class Node:
    """An edge with its lower end. `best`: the most frequent child, if known."""

    __slots__ = ("best", "children", "count", "length", "parent", "start", "text")

    def __init__(
        self, parent: "Node | None", text: list[int], start: int, length: int, count: int
    ) -> None:
        self.parent, self.text, self.start, self.length = parent, text, start, length
        self.count = count
        self.children: dict[int, Node] = {}
        self.best: Node | None = None

    @property
    def token(self) -> int:
        """First token of the edge."""
        return self.text[self.start]

    def only(self) -> "Node | None":
        """The child, if there is exactly one."""
        return next(iter(self.children.values())) if len(self.children) == 1 else None

    def first(self) -> "Node | None":
        """The most frequent child; of equals, that of the smallest token."""
        if self.best is None and self.children:
            self.best = min(self.children.values(), key=lambda c: (-c.count, c.token))
        return self.best

    def rose(self, child: "Node") -> None:
        """A child is new or has a higher count."""
        best = self.best
        if best is child:
            return
        if best is None:
            self.best = child if len(self.children) == 1 else None
        elif child.count > best.count or (child.count == best.count and child.token < best.token):
            self.best = child


@dataclass(slots=True)
class Drafting:
    """How drafts are cut from a tree."""

    cap: int = 32  #: most tokens
    factor: float = 1.0  #: tokens drafted for each token matched (the paper's alpha)
    offset: float = 0.0  #: and beside that
    min_prob: float = 0.1  #: tokens less probable than this are left out (paper: 0.1)
    tree: bool = False  #: several branches; else the most frequent one

    def __post_init__(self) -> None:
        if self.cap < 1 or self.factor < 0 or not 0 < self.min_prob <= 1:
            raise ConfigError(
                f"cap {self.cap}, factor {self.factor}, min_prob {self.min_prob}: "
                "cap must be at least 1, factor at least 0, min_prob above 0 and at most 1"
            )

    def most(self, matched: int) -> int:
        """Tokens allowed after a match of this length."""
        return min(self.cap, floor(self.factor * matched + self.offset))


@dataclass(slots=True)
class Found:
    """A draft from a tree: tokens, each one's parent (-1: the context) and n(child)/n(parent)."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    score: float = 0.0  #: sum of the tokens' probabilities: tokens expected to be accepted
    matched: int = 0  #: tokens of context that it follows

    def add(self, token: int, parent: int, sure: float, prob: float) -> None:
        """One token more."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.confidence.append(sure)
        self.score += prob


@dataclass(slots=True)
class _Text:
    """A sequence: its tokens, and the node of each open suffix by length, 0 first."""

    tokens: list[int]
    ends: list[Node]


class SuffixTree:
    """Counts of all runs of at most `depth` tokens, and drafts by them."""

    def __init__(self, depth: int = 64) -> None:
        if depth < 2:
            raise ConfigError(f"a suffix tree of depth {depth}; it takes at least 2")
        self.depth = depth
        self._root = Node(None, [], 0, 0, 0)
        self._texts: dict[int, _Text] = {}
        self.tokens = 0  #: of the sequences in it

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence `key`; a new one begins at its first call."""
        text = self._texts.get(key)
        if text is None:
            text = self._texts[key] = _Text([], [self._root])
        elif not text.ends:
            raise ValueError(f"sequence {key} of the suffix tree is closed")
        for token in tokens:
            at = len(text.tokens)
            text.tokens.append(token)
            ends = [self._advance(end, text.tokens, at, token) for end in text.ends]
            text.ends = [self._root, *ends[: self.depth - 1]]
        self.tokens += len(tokens)

    def close(self, key: int) -> None:
        """Nothing more will be appended to this sequence."""
        if key in self._texts:
            self._texts[key].ends = []

    def remove(self, key: int) -> None:
        """Take a sequence out, with all it was counted for."""
        tokens = self._texts.pop(key).tokens
        for start in range(len(tokens)):
            self._drop(tokens, start)
        self.tokens -= len(tokens)

    def count(self, run: Sequence[int]) -> int:
        """Places where a run of 1 to `depth` tokens occurs."""
        found = self._walk(list(run))
        return found[0].count if found else 0

    def speculate(self, context: Sequence[int], how: Drafting) -> Found:
        """The best draft over all lengths of match with the end of `context`; ties: the longest.

        Lengths with room for long drafts come first: a score is at most the number of tokens, and
        a chain ends where the tree does.
        """

        def room(matched: int) -> int:
            most = how.most(matched)
            return most if how.tree else min(most, self.depth - matched)

        tail = list(context[-self.depth :])
        best = Found()
        for matched in sorted(range(self._longest(tail), 0, -1), key=room, reverse=True):
            most = room(matched)
            if most < 1 or (most, matched) <= (best.score, best.matched):
                continue
            place = self._walk(tail[len(tail) - matched :])
            assert place is not None
            grow = _branches if how.tree else _chain
            found = grow(*place, most, how.min_prob)
            if found.tokens and (found.score, matched) > (best.score, best.matched):
                best = found
                best.matched = matched
        return best

    def nodes(self) -> int:
        """Nodes of the tree, the root aside; walks all of it."""
        stack, total = [self._root], -1
        while stack:
            node = stack.pop()
            total += 1
            stack.extend(node.children.values())
        return total

    # append

    def _advance(self, node: Node, text: list[int], at: int, token: int) -> Node:
        """Move the suffix that ends at `node` over the token text[at]; where it ends then."""
        child = node.children.get(token)
        if child is None:
            if not node.children and node.count == 1:  # a leaf of its own grows
                node.text, node.start = text, at - node.length
                node.length += 1
                return node
            leaf = Node(node, text, at, 1, 1)
            node.children[token] = leaf
            node.rose(leaf)
            return leaf
        if child.length == 1:
            child.count += 1
            child.text, child.start = text, at
            node.rose(child)
            self._join(node)
            return child
        if node.parent and len(node.children) == 1 and node.count == child.count + 1:
            node.text, node.start = text, at - node.length  # only this suffix ended here
            node.length += 1
            child.start += 1
            child.length -= 1
            node.children = {child.token: child}
            node.best = child
            return node
        return self._split(node, child, text, at)

    def _split(self, node: Node, child: Node, text: list[int], at: int) -> Node:
        """Cut `child`'s edge after its first token; the upper part counts one more."""
        upper = Node(node, text, at, 1, child.count + 1)
        child.start += 1
        child.length -= 1
        child.parent = upper
        upper.children = {child.token: child}
        upper.best = child
        node.children[upper.token] = upper
        if node.best is child:
            node.best = upper
        else:
            node.rose(upper)
        return upper

    def _join(self, node: Node) -> None:
        """Make one edge of a node and its only child if no suffix ends between them."""
        child, parent = node.only(), node.parent
        if parent is None or child is None or child.count != node.count:
            return
        child.start -= node.length
        child.length += node.length
        child.parent = parent
        parent.children[child.token] = child
        if parent.best is node:
            parent.best = child

    # removal

    def _drop(self, text: list[int], start: int) -> None:
        """Take out the suffix at `start`, to its depth."""
        node, at, end = self._root, start, min(len(text), start + self.depth)
        while at < end:
            child = node.children[text[at]]
            child.count -= 1
            if node.best is child:
                node.best = None
            if not child.count:
                del node.children[text[at]]
                break
            at += child.length
            node = child
        self._join(node)

    # match

    def _walk(self, run: list[int]) -> tuple[Node, int] | None:
        """The node on whose edge the run ends, and how far along; None: it does not occur."""
        node, at = self._root, 0
        while at < len(run):
            child = node.children.get(run[at])
            if child is None:
                return None
            step = min(child.length, len(run) - at)
            if step > 1 and child.text[child.start : child.start + step] != run[at : at + step]:
                return None
            at += step
            node = child
            if step < child.length:
                return node, step
        return node, node.length

    def _longest(self, tail: list[int]) -> int:
        """Most tokens of the end of `tail` that occur; if a run occurs, so do all its ends."""
        low, high = 0, len(tail)
        while low < high:
            middle = (low + high + 1) // 2
            if self._walk(tail[len(tail) - middle :]) is None:
                high = middle - 1
            else:
                low = middle
        return low


def _chain(node: Node, along: int, most: int, min_prob: float) -> Found:
    """Follow the most frequent child while its probability lasts."""
    found, prob, sure = Found(), 1.0, 1.0
    while len(found.tokens) < most:
        if along == node.length:
            child = node.first()
            if child is None:
                break
            sure = child.count / node.count
            prob *= sure
            if prob < min_prob:
                break
            node, along = child, 0
        else:
            sure = 1.0
        found.add(node.text[node.start + along], len(found.tokens) - 1, sure, prob)
        along += 1
    return found


def _branches(node: Node, along: int, most: int, min_prob: float) -> Found:
    """Take the most probable token of all branches, again and again."""
    found = Found()
    heap: list[tuple[float, int, int, float, Node, int]] = []
    order = 0  # of equal probabilities, the earlier pushed

    def push(prob: float, parent: int, node: Node, along: int) -> None:
        nonlocal order
        if along < node.length:
            heapq.heappush(heap, (-prob, order, parent, 1.0, node, along))
            order += 1
            return
        for child in sorted(node.children.values(), key=lambda c: (-c.count, c.token)):
            sure = child.count / node.count
            if prob * sure < min_prob:
                break
            heapq.heappush(heap, (-prob * sure, order, parent, sure, child, 0))
            order += 1

    push(1.0, -1, node, along)
    while heap and len(found.tokens) < most:
        negative, _, parent, sure, node, along = heapq.heappop(heap)
        found.add(node.text[node.start + along], parent, sure, -negative)
        push(-negative, len(found.tokens) - 1, node, along + 1)
    return found
