"""Samplers of drafting models: one keeps what it drew from, one the tokens to branch into."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.kernels.upload import upload
from kvarn.runner.choose import draw
from kvarn.runner.sampler import Ints, Sampled, Sampler
from kvarn.runner.uniform import sequence_key, stream, uniform
from kvarn.runner.verify import Drafted, Drawn

Children = list[tuple[int, float]]  #: tokens and their probabilities, the likeliest first

OWN = 1  #: makes the drafter's keys others than the target's


class DraftSampler(Sampler):
    """Random numbers are new in every step, and none of the target's.

    A place may be drafted several times. Whether it is drafted again may follow from what was drawn
    there before (a length control looks at confidence), so that draws that were the same each time
    would not be distributed as `q` says.
    """

    def __init__(self, vocab: int, device: torch.device, seed: int) -> None:
        super().__init__(vocab, device, sequence_key(seed, OWN), None)
        self.q: dict[int, Tensor] = {}  #: [vocab] by device row: of the last step's draws
        self._steps = 0
        self._weights: Tensor | None = None

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        rows: Ints,
        lengths: Ints,
        tokens: NDArray[np.int32],
        drafted: Drafted | None = None,
    ) -> Sampled:
        """See `Sampler.sample`; then `q` holds what was drawn from. Rows are unlike."""
        self._steps += 1
        self._weights = None
        warm = rows[self._rows[rows]["temperature"] > 0]
        sampled = super().sample(logits, rows, lengths, tokens, drafted)
        self.q = {} if self._weights is None else dict(zip(warm.tolist(), self._weights))
        return sampled

    def plain(self, rows: Ints) -> bool:
        """Draws are made here, where their distributions are kept."""
        return super().plain(rows) and not bool((self._rows[rows]["temperature"] > 0).any())

    def _choose_on_gpu(
        self,
        logits: Tensor,
        rows: Ints,
        lengths: Ints,
        state: NDArray[np.void],
        result: Sampled,
        drawn: Drawn | None,
    ) -> Ints:
        return self._choose(logits, rows, lengths, state, result, drawn)

    def _draw(
        self, logits: Tensor, state: NDArray[np.void], u: NDArray[np.float64]
    ) -> tuple[Tensor, Tensor]:
        best = self._weigh(logits, state)
        self._weights = logits / logits.sum(-1, keepdim=True)
        keys = stream(state["key"], self._steps)
        numbers = uniform(keys, np.zeros(len(keys), np.int64))
        return draw(logits, upload([numbers], torch.float64, self._device)[0]), best


class BranchSampler(Sampler):
    """Names the `width` likeliest tokens of every row, at temperature 1, and chooses the first."""

    def __init__(self, vocab: int, device: torch.device, width: int) -> None:
        super().__init__(vocab, device, 0, None)
        self.width = min(width, vocab)
        #: by device row, of the last step: of each of its rows of logits; [] where they are faulty
        self.found: dict[int, list[Children]] = {}

    @torch.inference_mode()
    def sample(
        self,
        logits: Tensor,
        rows: Ints,
        lengths: Ints,
        tokens: NDArray[np.int32],
        drafted: Drafted | None = None,
    ) -> Sampled:
        """See `Sampler.sample`; then `found` holds what each row may go on with."""
        logits = logits.float()
        best = logits.topk(self.width)
        # one copy to the host; ids below 2^24 are exact
        said = torch.cat((best.indices, (best.values - logits.logsumexp(-1, True)).exp()), 1)
        chosen, self.found = list[int](), {}
        for row, numbers in zip(rows.tolist(), said.tolist()):
            ids, probs = map(int, numbers[: self.width]), numbers[self.width :]
            fine = probs[0] == probs[0]  # not a number where a logit is none, or none is finite
            children = list(zip(ids, probs)) if fine else []
            self.found.setdefault(row, []).append(children)
            chosen.append(children[0][0] if children else -1)
        return Sampled(chosen)

    def plain(self, rows: Ints) -> bool:
        """Tokens are chosen here, where the others are named."""
        return False
