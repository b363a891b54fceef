"""`Updater`: lessons in, the drafter's next weights out, ready to be put in force."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvarn.models.decoder import Decoder
from kvarn.speculate.train.lessons import Lesson
from kvarn.speculate.train.student import Student


@dataclass(slots=True)
class Weights:
    """A version of the drafter: as it is trained, and as it drafts."""

    tensors: dict[str, Tensor]
    decoder: Decoder


@dataclass(slots=True)
class Update:
    """What came of some lessons."""

    weights: Weights
    loss: float  #: mean over the update's batches [nats]
    seconds: float  #: that it took, by the clock of its `Updater`


class Updates(Protocol):
    """What makes updates."""

    def update(
        self, lessons: Sequence[Lesson], begin: Weights | None, go_on: Callable[[], bool]
    ) -> Update | None:
        """The weights after these lessons, or None where it was told to stop.

        `begin`: what to begin from, where that is not what the last update ended with.
        """
        ...


@dataclass(slots=True)
class Updater:
    """A student, and how its weights become a decoder."""

    student: Student
    build: Callable[[dict[str, Tensor]], Decoder]
    clock: Callable[[], float] = time.thread_time  #: of what an update takes [s]

    def weights(self) -> Weights:
        """As the student is now."""
        tensors = self.student.weights()
        return Weights(tensors, self.build(tensors))

    def update(
        self, lessons: Sequence[Lesson], begin: Weights | None, go_on: Callable[[], bool]
    ) -> Update | None:
        """See `Updates.update`."""
        began = self.clock()
        if begin is not None:
            self.student.restore(begin.tensors)
        loss = self.student.learn(lessons, go_on)
        if loss is None or not go_on():
            return None
        weights = self.weights()
        return Update(weights, loss, self.clock() - began)
