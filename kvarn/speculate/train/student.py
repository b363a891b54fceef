"""`Student`: a drafter's trainable copy, which learns from lessons a few at a time.

The loss is of two distributions over the target's most likely tokens and one bucket for all others
(as in `kvarn.speculate.train.drafter`), at the places where a draft was refused (arXiv 2310.07177,
section 4) or at every place that was judged.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from kvarn.speculate.train.drafter import logprobs_of
from kvarn.speculate.train.lessons import Label, Lesson
from kvarn.speculate.train.network import Network, autocast

Loss = Literal["forward", "reverse", "jsd", "token"]
SMALLEST = 1e-5  #: chance of the bucket of all other tokens, at least


@dataclass(slots=True)
class Recipe:
    """How a student learns."""

    loss: Loss = "forward"  #: KL(target || drafter), its reverse, Jensen-Shannon, or best token
    wrong_only: bool = False  #: only where a draft was refused
    rate: float = 5e-4  #: AdamW's, constant after `warmup` optimizer steps that rise to it
    warmup: int = 16
    passes: int = 2  #: over the lessons of an update
    batch: int = 8  #: lessons of an optimizer step
    clip: float = 1.0  #: norm of the gradient
    others: int = 2048  #: tokens drawn at random that stand for all that are nobody's label


class Student:
    """Learns in place; what it has become is asked for with `weights`."""

    def __init__(self, network: Network, how: Recipe, seed: int = 0) -> None:
        self.network, self.how = network, how
        self.labels = 0  #: learnt from, passes counted
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer, self._steps = self._fresh(), 0

    def _fresh(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.network.parameters(), lr=self.how.rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def weights(self) -> dict[str, Tensor]:
        """A copy of what it knows, by the names of `kvarn.models.weights`."""
        return {name: x.detach().clone() for name, x in self.network.state_dict().items()}

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Be what it was; the optimizer's memory is of what it was not, and goes."""
        self.network.load_state_dict(weights)
        self._optimizer, self._steps = self._fresh(), 0

    def learn(
        self, lessons: Sequence[Lesson], go_on: Callable[[], bool] = lambda: True
    ) -> float | None:
        """Mean loss [nats] of the batches of an update; `go_on` is asked before each lesson, and
        within one before each layer, forward and back, where its answer is of no consequence.

        None: there was nothing to learn from, or it was stopped first. Raises `FloatingPointError`
        where the loss is no number.
        """
        losses = list[float]()
        for batch in self._batches(lessons):
            loss = self._step(batch, go_on)
            if loss is None:
                break
            losses.append(loss)
        return sum(losses) / len(losses) if losses else None

    def _batches(self, lessons: Sequence[Lesson]) -> Iterator[list[Lesson]]:
        some = [
            Lesson(one.tokens, labels) for one in lessons if (labels := self._wanted(one.labels))
        ]
        for _ in range(self.how.passes if some else 0):
            order = torch.randperm(len(some), generator=self._generator).tolist()
            for start in range(0, len(order), self.how.batch):
                yield [some[i] for i in order[start : start + self.how.batch]]

    def _wanted(self, labels: list[Label]) -> list[Label]:
        return [one for one in labels if one.wrong] if self.how.wrong_only else labels

    def _step(self, batch: list[Lesson], go_on: Callable[[], bool]) -> float | None:
        """One step of the optimizer; None, and nothing learnt, where it is stopped within.

        Lesson by lesson: whoever waits for the processor waits for one of them, not for all.
        """
        labels = sum(len(one.labels) for one in batch)
        self._optimizer.zero_grad(set_to_none=True)
        found = 0.0
        for one in batch:
            if not go_on():
                return None
            with autocast(self.network.embed.device):
                loss = lesson_loss(self.network, [one], self.how, self._generator, go_on)
                loss = loss * (len(one.labels) / labels)
            found += loss.item()
            if not math.isfinite(found):
                raise FloatingPointError(f"the loss of an update is {found}")
            loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(self.network.parameters(), self.how.clip)
        self._steps += 1
        for group in self._optimizer.param_groups:
            group["lr"] = self.how.rate * min(1.0, self._steps / self.how.warmup)
        self._optimizer.step()
        self.labels += labels
        return found


def lesson_loss(
    network: Network,
    batch: Sequence[Lesson],
    how: Recipe,
    generator: torch.Generator,
    pause: Callable[[], object] | None = None,
) -> Tensor:
    """Mean loss over the labels of the batch [nats]; `pause` as in `Network`."""
    tokens = pad_sequence([torch.tensor(one.tokens) for one in batch], batch_first=True)
    states = network(tokens, pause)
    # the state at a token foretells the next one
    at = [(row, label.place - 1) for row, one in enumerate(batch) for label in one.labels]
    rows, places = torch.tensor(at).T
    labels = [label for one in batch for label in one.labels]
    top = torch.from_numpy(np.array([label.top for label in labels], np.int64))
    target = torch.from_numpy(np.array([label.logprobs for label in labels], np.float32))
    student = logprobs_of(network, states[rows, places], top, how.others, generator)
    if how.loss == "token":
        return -student[:, 0].mean()
    return _distance(how.loss, _with_rest(target), _with_rest(student)).mean()


def _distance(loss: Loss, p: Tensor, q: Tensor) -> Tensor:
    """Of the target's logprobs p and the drafter's q [n, TOP + 1]; [n]."""
    if loss == "forward":
        return (p.exp() * (p - q)).sum(1)
    if loss == "reverse":
        return (q.exp() * (q - p)).sum(1)
    middle = ((p.exp() + q.exp()) / 2).log()
    return ((p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)) / 2


def _with_rest(logprobs: Tensor) -> Tensor:
    """[n, TOP + 1]: the last column is of all tokens that are not named."""
    rest = (1.0 - logprobs.exp().sum(1, keepdim=True)).clamp_min(SMALLEST)
    return torch.cat((logprobs, rest.log()), 1)
