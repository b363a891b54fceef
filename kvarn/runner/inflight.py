"""`InFlight`: a step that was handed to the device and has not been looked at yet."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvarn.core.plan import SpanResult, StepResult
from kvarn.runner.batch import Batch
from kvarn.runner.image import Image, Ints
from kvarn.runner.sampler import Sampled


@dataclass(slots=True)
class InFlight:
    """One step; `result` waits for the device the first time it is called."""

    outcome: StepResult
    began: float  #: [s]
    image: Image
    batch: Batch | None = None
    owners: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    at: Ints = field(default_factory=lambda: np.zeros(0, np.int64))  #: where the tokens go
    _tokens: Tensor | None = None  #: on the host once `_done` has happened
    _done: torch.cuda.Event | None = None
    _settled: bool = False

    def expect(self, batch: Batch) -> None:
        """Make room for the tokens of every span that has caught up with what is known."""
        self.batch = batch
        rows = batch.rows[batch.logits_spans]
        self.owners = self.image.owner[rows]
        self.at = self.image.reserve(rows)

    def fetch(self, tokens: Tensor) -> None:
        """Start copying the tokens [R] to the host."""
        if not tokens.is_cuda:
            self._tokens = tokens
            return
        self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        self._tokens.copy_(tokens, non_blocking=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def result(self) -> StepResult:
        """What the step gave."""
        if not self._settled:
            self._settled = True
            if self._done is not None:
                self._done.synchronize()
            if self._tokens is not None:
                self.settle(Sampled(self._tokens.tolist()))
            self.outcome.seconds = time.perf_counter() - self.began
        return self.outcome

    def settle(self, sampled: Sampled) -> None:
        """Record what was sampled; a negative token is a fault of the model's logits."""
        batch, result = self.batch, self.outcome
        assert batch is not None
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
