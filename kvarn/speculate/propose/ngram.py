"""Prompt lookup: what followed the last tokens when they last occurred in the same sequence.

An index of each sequence's runs of n tokens, n in n_min..n_max, kept up with the tokens that are
new since the last round; a draft costs the same at any length of prompt. The longest run that has
occurred before wins, and of its occurrences the latest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvarn.core.errors import ConfigError
from kvarn.core.part import Part
from kvarn.core.plan import Draft, SeqId
from kvarn.core.seq import Seq
from kvarn.speculate.part import Ask, LengthControl, Verified

PRIOR_RATE, PRIOR_WEIGHT = 0.5, 4.0  #: a match is trusted so far before any was verified [tokens]


@dataclass(slots=True)
class _Index:
    """Of one sequence: where each run of tokens last ended, as the position after it."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    known: int = 0  #: positions whose runs are indexed
    used: int = 0  #: length of the run that the last draft followed


class NGram(Part):
    """Drafts from the sequence itself; sure of a token by how often such drafts were right."""

    name, kind = "ngram", "proposer"
    regime = (
        "Outputs that repeat their prompt or themselves (editing, extraction, code). Loses on free "
        "text, where its drafts are refused, and to a suffix tree where other requests repeat."
    )

    def __init__(self, n_min: int = 2, n_max: int = 4, window: int = 65536) -> None:
        """`window`: latest positions of a sequence that are indexed, the bound on its memory."""
        if not 1 <= n_min <= n_max:
            raise ConfigError(
                f"n-grams of {n_min} to {n_max} tokens; 1 <= n_min <= n_max must hold"
            )
        if window < n_max:
            raise ConfigError(f"an n-gram window of {window} tokens; at least n_max = {n_max}")
        self.n_min, self.n_max, self.window = n_min, n_max, window
        self._indexes: dict[SeqId, _Index] = {}
        self._right = dict.fromkeys(range(n_min, n_max + 1), PRIOR_RATE * PRIOR_WEIGHT)
        self._tried = dict.fromkeys(range(n_min, n_max + 1), PRIOR_WEIGHT)

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        """The tokens after the latest earlier match; empty where there is none."""
        return [self._draft(ask, control) for ask in asks]

    def behind(self, seq: Seq) -> int:
        """Tokens that are not in its index."""
        index = self._indexes.get(seq.id)
        return len(seq.tokens) - (index.known if index is not None else 0)

    def observe(self, records: Sequence[Verified]) -> None:
        """Count the tokens tried, up to the first that was refused, by the length of match."""
        for record in records:
            index = self._indexes.get(record.seq)
            if index is None or not index.used or not record.drafted:
                continue
            self._right[index.used] += record.accepted
            self._tried[index.used] += record.judged

    def forget(self, seq: Seq) -> None:
        """Its index goes."""
        self._indexes.pop(seq.id, None)

    def rate(self, n: int) -> float:
        """Share of the tokens drafted after runs of n that were right."""
        return self._right[n] / self._tried[n]

    def entries(self) -> int:
        """Runs held, of all sequences."""
        return sum(len(index.after) for index in self._indexes.values())

    def _draft(self, ask: Ask, control: LengthControl) -> Draft:
        tokens = ask.seq.tokens
        index = self._indexes.setdefault(ask.seq.id, _Index())
        self._catch_up(index, tokens)
        draft, index.used = Draft(), 0
        for n in range(min(self.n_max, len(tokens)), self.n_min - 1, -1):
            at = index.after.get(tuple(tokens[-n:]))
            if at is None:
                continue
            index.used = n
            sure = self.rate(n)
            for token in tokens[at : at + ask.most]:
                if not control.goes_on(draft.confidence):
                    break
                draft.tokens.append(token)
                draft.confidence.append(sure)
            break
        return draft

    def _catch_up(self, index: _Index, tokens: list[int]) -> None:
        """Index the runs that end before the last token: that one has nothing after it yet."""
        after, window = index.after, self.window
        first = max(index.known, len(tokens) - 1 - window)
        for end in range(first + 1, len(tokens)):
            old = end - window
            for n in range(self.n_min, self.n_max + 1):
                if end >= n:
                    after[tuple(tokens[end - n : end])] = end
                if old >= n:
                    gone = tuple(tokens[old - n : old])
                    if after.get(gone) == old:
                        del after[gone]
        index.known = max(index.known, len(tokens) - 1)
