"""What only some requests ask of the hidden states: prompt logprobs and embeddings."""

import torch
from torch import Tensor

from kvarn.core.plan import SpanResult, StepResult, TokenLogprobs
from kvarn.core.request import Request
from kvarn.models.decoder import Decoder
from kvarn.runner.batch import Batch
from kvarn.runner.image import Image
from kvarn.runner.logprobs import logprobs

SCORE_ROWS = 128  #: prompt positions whose logits are held at once


class Extras:
    """The rows that want more than tokens, and what has been summed up for them."""

    def __init__(self, decoder: Decoder, image: Image) -> None:
        self.decoder = decoder
        self.image = image
        self._rows: set[int] = set()
        self._pooled: dict[int, Tensor] = {}  # by row: sum of hidden states of an embedding request

    def start(self, row: int, request: Request) -> None:
        """A sequence enters `row`."""
        if request.pooling is not None or request.sampling.prompt_logprobs is not None:
            self._rows.add(row)

    def stop(self, row: int) -> None:
        """The sequence in `row` leaves."""
        self._rows.discard(row)
        self._pooled.pop(row, None)

    def wanted(self, batch: Batch) -> bool:
        """Whether any span of the batch wants more than a token."""
        return bool(self._rows) and not self._rows.isdisjoint(batch.rows.tolist())

    def take(self, batch: Batch, hidden: Tensor, result: StepResult) -> None:
        """Fill in the extras of the spans whose requests ask for them."""
        for at, row in enumerate(batch.rows.tolist()):
            if row not in self._rows:
                continue
            request = self.image.requests[row]
            mine = hidden[batch.indptr[at] : batch.indptr[at + 1]]
            end = int(batch.ends[at])
            extra = result.extras.setdefault(int(batch.spans[at]), SpanResult())
            if request.pooling is not None:
                extra.embedding = self._embed(row, mine, end)
            elif end - len(mine) < self.image.prompt_len[row]:
                extra.prompt_logprobs = self._score(row, mine, end - len(mine))
                extra.scored_from = end - len(mine) + 1

    def _embed(self, row: int, hidden: Tensor, end: int) -> list[float] | None:
        """The pooled hidden state, of length 1, once the prompt is through."""
        if self.image.requests[row].pooling == "mean":
            total = hidden.float().sum(0)
            if row in self._pooled:
                total += self._pooled[row]
            self._pooled[row] = total
        else:
            total = hidden[-1].float()
        if end < self.image.prompt_len[row]:
            return None
        unit: list[float] = torch.nn.functional.normalize(total, dim=0).tolist()
        return unit

    def _score(self, row: int, hidden: Tensor, start: int) -> list[TokenLogprobs]:
        """Logprobs of the prompt's tokens start+1 .. as far as `hidden` reaches."""
        prompt_len = int(self.image.prompt_len[row])
        count = self.image.requests[row].sampling.prompt_logprobs
        assert count is not None
        scores: list[TokenLogprobs] = []
        targets = self.image.tokens[row, start + 1 : min(start + len(hidden) + 1, prompt_len)]
        for at in range(0, len(targets), SCORE_ROWS):
            part = targets[at : at + SCORE_ROWS]
            logits = self.decoder.logits(hidden[at : at + len(part)])
            scores += logprobs(logits, part.tolist(), count)
        return scores
