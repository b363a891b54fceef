"""The stream of verification records: every draft that was judged, with what the target said of it.

Who wants them appends a function to `Speculation.listeners`; without one nothing is made. They come
in the order of steps, from the thread that steps, which waits for the listener.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvarn.core.plan import Draft, SeqId, StepPlan, StepResult


@dataclass(slots=True)
class Record:
    """One draft of one sequence, judged in one step."""

    seq: SeqId
    step: int
    place: int  #: of the first drafted token [tokens from the start of the sequence]
    draft: Draft  #: what was judged of it: tokens, parents in a tree, confidence, q if it is known
    #: tokens of the draft that stand; of a tree, along the accepted path
    accepted: int
    #: what was committed: the tokens that stand, and the target's own after them
    committed: list[int]

    @property
    def chosen(self) -> int:
        """The target's token at the first mismatch, or after the whole draft."""
        return self.committed[-1]


Listener = Callable[[Record], None]


def records(plan: StepPlan, result: StepResult, drafts: Mapping[SeqId, Draft]) -> list[Record]:
    """Of a step that came back; drafts whose verification met a fault of the logits have none, nor
    do those of sequences that ended meanwhile."""
    return [
        Record(
            span.seq,
            plan.step,
            span.start + span.length - span.drafts,
            drafts[span.seq].first(span.drafts),
            len(tokens) - 1,
            tokens,
        )
        for span, tokens in zip(plan.spans, result.tokens, strict=True)
        if span.drafts and tokens and span.seq in drafts
    ]
