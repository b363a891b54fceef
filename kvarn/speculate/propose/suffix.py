"""SuffixDecoding: drafts from suffix trees over the request and over past outputs (2411.04975).

Each request has a tree of its prompt and output; each tenant has one of all outputs, of finished
requests and running ones. `cache_salt` tells tenants apart: a draft never shows what another
tenant's requests said. The oldest outputs leave the tenants' trees when these are full.

A draft is the most frequent continuation (a chain), or the most probable tokens of all of them (a
tree): where texts went on in several ways a tree has more than one, and is less deep for it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from kvarn.core.errors import ConfigError
from kvarn.core.part import Part
from kvarn.core.plan import Draft, SeqId
from kvarn.core.seq import Seq
from kvarn.speculate.part import Ask, LengthControl, Verified
from kvarn.speculate.propose.suffix_tree import Drafting, Found, SuffixTree


class Tree(Protocol):
    """A counted suffix tree: `suffix_tree.SuffixTree`, or its compiled form."""

    tokens: int  #: of the sequences in it

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence `key`; a new one begins at its first call."""
        ...

    def close(self, key: int) -> None:
        """Nothing more will be appended to this sequence."""
        ...

    def remove(self, key: int) -> None:
        """Take a sequence out."""
        ...

    def speculate(self, context: Sequence[int], how: Drafting) -> Found:
        """The best draft after this context."""
        ...


@dataclass(slots=True)
class _Request:
    """One sequence in both of its trees."""

    key: int  #: in its tenant's tree
    tenant: str
    local: Tree
    read: int = 0  #: tokens in the local tree
    output: int = 0  #: tokens in the tenant's tree
    evicted: bool = False  #: the tenant's tree no longer takes it


@dataclass(slots=True)
class _Outputs:
    """The tenants' trees, and their sequences by age."""

    trees: dict[str, Tree] = field(default_factory=dict)
    ages: deque[_Request] = field(default_factory=deque)
    tokens: int = 0


class Suffix(Part):
    """The draft with the highest expected number of accepted tokens, over both trees."""

    name, kind, paper = "suffix", "proposer", "2411.04975"
    regime = (
        "Agents and edits that repeat earlier outputs: long drafts at little cost. Loses on fresh "
        "text, and where the time to read a long prompt into its tree is not earned back."
    )

    def __init__(
        self,
        how: Drafting | None = None,
        depth: int = 64,
        max_tokens: int = 200_000,
        catch_up: int = 512,
        tree: Callable[[int], Tree] = SuffixTree,
    ) -> None:
        """`max_tokens`: in all tenants' trees; `catch_up`: tokens read a round for a sequence.

        A sequence is drafted for from its own tree once that has caught up with its prompt.
        `tree` makes a tree of a depth.
        """
        if max_tokens < 1 or catch_up < 1:
            raise ConfigError(
                f"max_tokens {max_tokens}, catch_up {catch_up}; both must be at least 1"
            )
        self.how, self.depth = how or Drafting(), depth
        self.max_tokens, self.catch_up = max_tokens, catch_up
        self._tree = tree
        self._outputs = _Outputs()
        self._requests: dict[SeqId, _Request] = {}
        self._keys = 0

    @property
    def tokens(self) -> int:
        """Tokens in the tenants' trees."""
        return self._outputs.tokens

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        """All sequences are read before the first is drafted for."""
        requests = [self._read(ask.seq) for ask in asks]
        return [self._draft(*pair, control) for pair in zip(asks, requests, strict=True)]

    def behind(self, seq: Seq) -> int:
        """Tokens that are not in its own tree."""
        request = self._requests.get(seq.id)
        return len(seq.tokens) - (request.read if request is not None else 0)

    def observe(self, records: Sequence[Verified]) -> None:
        """Nothing to learn: the counts say it all."""

    def forget(self, seq: Seq) -> None:
        """The rest of its output enters the tenant's tree; its own tree goes."""
        if seq.generates:
            request = self._request(seq)
            self._read_output(seq, request)
            tree = self._outputs.trees.get(request.tenant)
            if tree is not None and not request.evicted:
                tree.close(request.key)
            del self._requests[seq.id]

    def _draft(self, ask: Ask, request: _Request, control: LengthControl) -> Draft:
        tokens = ask.seq.tokens
        how = replace(self.how, cap=min(self.how.cap, ask.most))
        context = tokens[-self.depth :]
        found = Found()
        if request.read == len(tokens):
            found = request.local.speculate(context, how)
        outputs = self._outputs.trees.get(request.tenant)
        if outputs is not None:
            other = outputs.speculate(context, how)
            if (other.score, other.matched) > (found.score, found.matched):
                found = other
        if how.tree:
            return pruned(found, control)
        count = 0
        while count < len(found.tokens) and control.goes_on(found.confidence[:count]):
            count += 1
        return Draft(found.tokens[:count], None, found.confidence[:count])

    def _request(self, seq: Seq) -> _Request:
        request = self._requests.get(seq.id)
        if request is None:
            self._keys += 1
            request = _Request(self._keys, seq.request.cache_salt, self._tree(self.depth))
            self._requests[seq.id] = request
        return request

    def _read(self, seq: Seq) -> _Request:
        """Enter what is new into both trees."""
        request = self._request(seq)
        new = seq.tokens[request.read : request.read + self.catch_up]
        request.local.extend(0, new)
        request.read += len(new)
        self._read_output(seq, request)
        return request

    def _read_output(self, seq: Seq, request: _Request) -> None:
        new = seq.tokens[seq.prompt_len + request.output :]
        if request.evicted or not new:
            return
        outputs = self._outputs
        if not request.output:
            outputs.ages.append(request)
        if request.tenant not in outputs.trees:
            outputs.trees[request.tenant] = self._tree(self.depth)
        outputs.trees[request.tenant].extend(request.key, new)
        request.output += len(new)
        outputs.tokens += len(new)
        while outputs.tokens > self.max_tokens:
            self._evict(outputs.ages.popleft())

    def _evict(self, oldest: _Request) -> None:
        tree = self._outputs.trees[oldest.tenant]
        tree.remove(oldest.key)
        self._outputs.tokens -= oldest.output
        oldest.evicted = True
        if not tree.tokens:
            del self._outputs.trees[oldest.tenant]


def pruned(found: Found, control: LengthControl) -> Draft:
    """What is left of a tree whose every path goes on for as long as the control lets it."""
    draft, parents = Draft(), list[int]()
    ways: dict[int, list[float]] = {-1: []}  #: confidence on the way to each token that is kept
    places, goes_on = {-1: -1}, dict[int, bool]()
    for i, (token, parent) in enumerate(zip(found.tokens, found.parents, strict=True)):
        if parent in ways and parent not in goes_on:
            goes_on[parent] = control.goes_on(ways[parent])
        if not goes_on.get(parent, False):
            continue
        ways[i] = [*ways[parent], found.confidence[i]]
        places[i] = len(draft.tokens)
        draft.tokens.append(token)
        parents.append(places[parent])
        draft.confidence.append(found.confidence[i])
    draft.parents = parents
    return draft
