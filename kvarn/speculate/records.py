"""The stream of verification records: every draft that was judged, with what the target said of it.

Who wants them appends a function to `Speculation.listeners`: a trainer, an experiment, a test. They
come step by step, all of a step together, from the thread that steps, which waits for the listener.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvarn.core.plan import Draft, SeqId, StepPlan, StepResult
from kvarn.speculate.part import Verified


@dataclass(slots=True)
class Record:
    """One draft of one sequence, judged in one step."""

    seq: SeqId
    step: int
    place: int  #: of the first drafted token [tokens from the start of the sequence]
    draft: Draft  #: what was judged of it: tokens, parents in a tree, confidence, q if it is known
    #: what was committed: the tokens that stand, and the target's own after them
    committed: list[int]
    #: an array [2, committed, k]: the target's most likely tokens at the place of each and their
    #: logprobs, best first; None: nobody asked
    alternatives: Any = None

    @property
    def accepted(self) -> int:
        """Tokens of the draft that stand; of a tree, along the accepted path."""
        return len(self.committed) - 1

    @property
    def judged(self) -> int:
        """Places at which the draft was held against the target: those where it stood, and the one
        where none of its tokens did. A path that stood to its end has no such one."""
        tokens, parents, here = self.draft.tokens, self.draft.parents, {-1}
        if parents is None:
            return min(self.accepted + 1, len(tokens))
        for token in self.committed[:-1]:
            here = {i for i, at in enumerate(parents) if at in here and tokens[i] == token}
        return self.accepted + (not here.isdisjoint(parents))

    @property
    def chosen(self) -> int:
        """The target's token at the first mismatch, or after the whole draft."""
        return self.committed[-1]

    def verified(self) -> Verified:
        """What controls and proposers are told of it."""
        draft = self.draft
        return Verified(
            self.seq, len(draft.tokens), self.accepted, draft.confidence, draft.depth, self.judged
        )


Listener = Callable[[list[Record]], None]


def records(plan: StepPlan, result: StepResult, drafts: Mapping[SeqId, Draft]) -> list[Record]:
    """Of a step that came back, for every sequence that it brought tokens; those that were not
    drafted for have an empty draft. Sequences that met a fault of the logits have none, nor do
    those that were drafted for and ended meanwhile."""
    return [
        Record(
            span.seq,
            plan.step,
            span.start + span.length - span.drafts,
            drafts[span.seq].first(span.drafts) if span.drafts else Draft(),
            tokens,
            result.alternatives.get(i),
        )
        for i, (span, tokens) in enumerate(zip(plan.spans, result.tokens, strict=True))
        if span.wants_logits and tokens and (span.seq in drafts or not span.drafts)
    ]
