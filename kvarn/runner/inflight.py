"""`InFlight`: a step that was handed to the device and has not been looked at yet."""

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from kvarn.core.plan import Choice, Draft, SpanResult, StepResult
from kvarn.kernels.upload import download
from kvarn.runner.batch import Batch
from kvarn.runner.image import Image, Ints
from kvarn.runner.pool import KVPool
from kvarn.runner.sampler import Sampled
from kvarn.runner.uniform import uniform
from kvarn.runner.verify import pretend, standing, walk


@dataclass(slots=True)
class Seen:
    """A replayed step's tokens and its inputs, on the device until its next replay."""

    chosen: Tensor  #: [T] int32
    said: Tensor  #: [T or more] int32, as `feed` takes them
    rows: Tensor  #: [T or more] int32


@dataclass(slots=True)
class InFlight:
    """One step; `result` waits for the device the first time it is called."""

    outcome: StepResult
    began: float  #: [s]
    image: Image
    pool: KVPool
    acceptance: float = 0.0  #: not 0: drafts are accepted by chance, not by judgement
    batch: Batch | None = None
    owners: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    at: Ints = field(default_factory=lambda: np.zeros(0, np.int64))  #: where the tokens go
    #: of each row of the logits, before any rule or temperature: [2, R, k], the most likely tokens
    #: and their logprobs, on the host as `_tokens` are; None: nobody asked
    alternatives: Tensor | None = None
    choices: dict[int, Tensor] = field(default_factory=dict)  #: by span, as `choose` was told
    seen: Seen | None = None  #: what a device needs that judges its drafts itself
    _tokens: Tensor | None = None  #: on the host once `_done` has happened
    _done: Any = None  #: the event behind the last copy
    _settled: bool = False

    @property
    def judges(self) -> bool:
        """Whether it verifies drafts."""
        return self.batch is not None and bool(self.batch.drafts)

    def expect(self, batch: Batch) -> None:
        """Make room for the tokens of every span that has caught up with what is known."""
        self.batch = batch
        if batch.drafts:
            return  # its tokens are looked at before anything else is planned
        rows = batch.rows[batch.logits_spans]
        self.owners = self.image.owner[rows]
        self.at = self.image.reserve(rows)

    def fetch(self, tokens: Tensor) -> None:
        """Start copying the tokens [R] to the host."""
        self._tokens = self._to_host(tokens)

    def keep(self, alternatives: Tensor) -> None:
        """Start copying them to the host."""
        self.alternatives = self._to_host(alternatives)

    def choose(self, span: int, found: Tensor) -> None:
        """What goes on of the prompt that `span` ends: positions, how many the scores lacked."""
        self.choices[span] = self._to_host(found)

    def _to_host(self, x: Tensor) -> Tensor:
        """Start copying: x is there once `_done` has happened."""
        there, self._done = download(x)
        return there

    def result(self) -> StepResult:
        """What the step gave."""
        if not self._settled:
            self._settled = True
            if self._done is not None:
                self._done.synchronize()
            if self._tokens is not None:
                self.settle(Sampled(self._tokens.tolist()))
            for span, found in self.choices.items():
                *positions, lacking = found.tolist()
                extra = self.outcome.extras.setdefault(span, SpanResult())
                extra.choice = Choice(positions, lacking)
            self.outcome.seconds = time.perf_counter() - self.began
        return self.outcome

    def settle(self, sampled: Sampled) -> None:
        """Record what was sampled; a negative token is a fault of the model's logits."""
        batch, result = self.batch, self.outcome
        assert batch is not None
        if batch.drafts:
            self._judge(batch, sampled)
            return
        tokens = np.array(sampled.tokens, np.int32)
        where = batch.logits_spans
        self.image.fill(batch.rows[where], self.owners, self.at, np.maximum(tokens, 0))
        spans = batch.spans[where].tolist()
        for at, (span, token) in enumerate(zip(spans, sampled.tokens)):
            result.tokens[span] = [token]
            if at in sampled.logprobs:
                extra = result.extras.setdefault(span, SpanResult())
                extra.logprobs = [sampled.logprobs[at]]
            if at in sampled.errors:
                result.extras.setdefault(span, SpanResult()).error = sampled.errors[at]
        for at in np.flatnonzero(tokens < 0).tolist():
            length = int(batch.ends[where[at]])
            extra = result.extras.setdefault(spans[at], SpanResult())
            extra.error = extra.error or f"the model's logits at position {length} are not finite"

    def _judge(self, batch: Batch, sampled: Sampled) -> None:
        """Commit what verification leaves of each span."""
        batch.settle()
        tokens = np.array(sampled.tokens, np.int64)
        told = sampled.errors or sampled.logprobs
        if batch.forest is None and not told and tokens.min(initial=0) >= 0:
            self._judge_chains(batch, tokens)
        else:
            self._judge_each(batch, sampled)

    def _judge_chains(self, batch: Batch, chosen: Ints) -> None:
        """All spans at once, of which nothing but tokens is asked."""
        places, of, image = batch.lengths, batch.logits_spans, self.image
        follows = np.append(of[1:] == of[:-1], False)  # a draft stands behind this row
        draft = batch.tokens[np.minimum(batch.logits_at + 1, len(batch.tokens) - 1)]
        if self.acceptance:
            keys = image.owner[batch.rows[of]].astype(np.uint64)
            stands = follows & (uniform(keys, places) < self.acceptance)
            chosen = np.where(stands, draft, chosen)
        else:
            stands = follows & (chosen == draft)
        first = np.flatnonzero(np.append(True, of[1:] != of[:-1]))
        last = standing(stands, first)
        kept = np.arange(len(of)) <= np.repeat(last, np.diff(np.append(first, len(of))))
        rows = batch.rows[of]
        image.commit_all(rows[kept], places[kept], chosen[kept])
        tokens, spans = chosen.tolist(), batch.spans[of[first]].tolist()
        for span, begin, end in zip(spans, first.tolist(), (last + 1).tolist()):
            self.outcome.tokens[span] = tokens[begin:end]
            if self.alternatives is not None and follows[begin]:
                self.outcome.alternatives[span] = self.alternatives.numpy()[:, begin:end]

    def _judge_each(self, batch: Batch, sampled: Sampled) -> None:
        """One span after the other: trees, and whatever else is asked.

        A position that could not be sampled ends its run: the next step meets the fault as the
        first position of its span, which is the sequence's error.
        """
        faults = {at for at, token in enumerate(sampled.tokens) if token < 0} | set(sampled.errors)
        moves = list[tuple[int, int, int]]()  # KV of trees: image row, position, new position
        indptr = np.searchsorted(batch.logits_spans, np.arange(len(batch.rows) + 1)).tolist()
        for at, (first, end) in enumerate(pairwise(indptr)):
            if first == end:
                continue
            span = int(batch.spans[at])
            faulty = {i for i in range(end - first) if first + i in faults}
            length = int(batch.lengths[first])
            if 0 in faulty:
                error = sampled.errors.get(first)
                error = error or f"the model's logits at position {length} are not finite"
                self.outcome.extras.setdefault(span, SpanResult()).error = error
                continue
            row, chosen = int(batch.rows[at]), sampled.tokens[first:end]
            draft = batch.drafts[at] or Draft()
            if self.acceptance and not faulty:
                run = pretend(chosen, draft, self.acceptance, int(self.image.owner[row]), length)
            else:
                run = walk(chosen, draft, faulty)
            moves += [
                (row, length - 1 + at, length - 1 + depth)
                for depth, at in enumerate(run.rows)
                if at != depth
            ]
            self.image.commit(row, length, run.tokens)
            self.outcome.tokens[span] = run.tokens
            if self.alternatives is not None and draft.tokens:
                rows = [first + row for row in run.rows]
                self.outcome.alternatives[span] = self.alternatives.numpy()[:, rows]
            if first in sampled.logprobs:
                extra = self.outcome.extras.setdefault(span, SpanResult())
                extra.logprobs = [sampled.logprobs[first + row] for row in run.rows]
        if moves:
            self.pool.move(self.image.tables, *np.array(moves, np.int64).T)
