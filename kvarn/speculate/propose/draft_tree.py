"""A smaller model drafts a tree: of all continuations it knows, those it thinks likeliest.

A token's reach is the product of the drafter's probabilities on the way to it. The tree is the
tokens with the highest reach (arXiv 2406.16858, section 4.2: expansion and reranking), found level
by level: a pass of the drafter computes the tokens among the best so far whose children are not
known, and ends once none of these could get a child into the tree. EAGLE-2 goes to a fixed depth
with a fixed number of tokens a level; here both follow from the probabilities.

Passes feed the tree anew from the last known token on, as verification does: a few rows more, and
no KV of the drafter's has to be kept by path. What the last pass leaves is the KV of the likeliest
path. All tokens are DELTA, so output is that of plain decoding at any temperature.

Regime: drafters whose first guess is often wrong and whose second or third is right, where a row
more of the target costs little. Loses to the chain where the drafter is sure (each place then has
one continuation), and where rows cost time.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import nsmallest

from kvarn.core.plan import Draft, SeqId, Span, StepPlan
from kvarn.kv.manager import KVManager
from kvarn.runner.drafting import BranchSampler, Children
from kvarn.runner.executor import Runner
from kvarn.speculate.part import LengthControl
from kvarn.speculate.propose.draft_model import DraftModel
from kvarn.speculate.propose.making import Making

WIDTH = 8  #: most continuations of a token that are looked at


@dataclass(slots=True)
class Candidates:
    """Tokens that could be in a tree; each is named after its parent."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    sure: list[float] = field(default_factory=list)  #: the drafter's probability of each
    reach: list[float] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)  #: whose children are known

    def add(self, parent: int, children: Children) -> None:
        """The children of a candidate; -1: of the last known token."""
        self.asked.add(parent)
        for token, sure in children:
            self.tokens.append(token)
            self.parents.append(parent)
            self.sure.append(sure)
            self.reach.append(sure * (self.reach[parent] if parent >= 0 else 1.0))

    def best(self, most: int) -> list[int]:
        """The tree: parents before children, as none reaches farther than its parent."""
        return nsmallest(most, range(len(self.tokens)), key=lambda i: (-self.reach[i], i))

    def ask(self, most: int, control: LengthControl, room: int) -> list[int]:
        """Candidates to compute next with all their ancestors, at most `room`, in rising order."""
        best = self.best(most)
        least = self.reach[best[-1]] if len(best) == most else 0.0
        wanted = set[int]()
        for i in best:
            if i in self.asked or self.reach[i] <= least:
                continue
            way = self.way(i)
            if len(wanted.union(way)) <= room and control.goes_on([self.sure[j] for j in way]):
                wanted.update(way)
        return sorted(wanted)

    def way(self, at: int) -> list[int]:
        """From the first token to this one."""
        found = list[int]()
        while at >= 0:
            found.append(at)
            at = self.parents[at]
        return found[::-1]

    def draft(self, some: Iterable[int]) -> Draft:
        """These candidates, parents before children, as a draft."""
        places, draft, parents = {-1: -1}, Draft(), list[int]()
        for i in some:
            places[i] = len(places) - 1
            draft.tokens.append(self.tokens[i])
            parents.append(places[self.parents[i]])
            draft.confidence.append(self.sure[i])
        draft.parents = parents
        return draft


class DraftTree(DraftModel):
    """See the module; followers, catching up and versions are those of `DraftModel`."""

    def __init__(
        self, runner: Runner, kv: KVManager, budget: int, max_seqs: int, branches: BranchSampler
    ) -> None:
        """See `DraftModel`; `branches` is the runner's sampler."""
        super().__init__(runner, kv, budget, max_seqs)
        self.branches = branches
        self._trees: dict[SeqId, Candidates] = {}

    def _run(self, plan: StepPlan, drafts: dict[SeqId, Making]) -> None:
        """The pass that catches up: the likeliest first tokens."""
        self.following.gone = []
        self._trees = {}
        self.runner.run(plan)
        for span in plan.spans:
            if span.wants_logits:
                tree = self._trees[span.seq] = Candidates()
                tree.add(-1, self._children(span.seq)[0])
                drafts[span.seq].follower.drafted = []

    def _go_on(self, drafts: dict[SeqId, Making], control: LengthControl) -> None:
        """Passes over the trees until none is asked about."""
        while True:
            asked = {
                seq: some
                for seq, one in drafts.items()
                if (some := self._trees[seq].ask(one.most, control, self.budget - 1))
            }
            if not asked:
                break
            for plan in self._passes(asked, drafts):
                self._ask(plan, asked, drafts)
        for seq, one in drafts.items():
            tree = self._trees[seq]
            one.draft = tree.draft(tree.best(one.most))

    def _passes(
        self, asked: Mapping[SeqId, list[int]], drafts: Mapping[SeqId, Making]
    ) -> Iterator[StepPlan]:
        """The trees in steps of at most `budget` rows, each behind its last known token."""
        plan = self._plan()
        for seq, some in asked.items():
            if plan.spans and plan.n_tokens + len(some) + 1 > self.budget:
                yield plan
                plan = self._plan()
            known = drafts[seq].follower.known
            self.runner.image.truncate(self.runner.image.row(seq), known)
            plan.spans.append(Span(seq, known - 1, len(some) + 1, len(some)))
            plan.drafts[seq] = self._trees[seq].draft(some)
        yield plan

    def _ask(
        self, plan: StepPlan, asked: Mapping[SeqId, list[int]], drafts: Mapping[SeqId, Making]
    ) -> None:
        """One pass: the children of all that were asked about; KV stays of the likeliest path."""
        result = self.runner.run(plan)
        for span, path in zip(plan.spans, result.tokens, strict=True):
            tree, follower = self._trees[span.seq], drafts[span.seq].follower
            for i, children in zip(asked[span.seq], self._children(span.seq)[1:], strict=True):
                if i not in tree.asked:
                    tree.add(i, children)
            follower.drafted = path[:-1]
            follower.seq.computed = follower.known + len(follower.drafted)

    def _children(self, seq: SeqId) -> list[Children]:
        return self.branches.found[self.runner.image.row(seq)]
