"""The batch-wide budget in modelled time: never slower than none, near the best fixed length."""

import random

import pytest

from kvarn.speculate.costs import Measured
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.survival import Survival
from kvarn.speculate.part import Round
from kvarn.speculate.trial import Roofline, Stream, play

FREE, DEAR = Roofline(), Roofline(token=0.03)  # rows are free up to 100; a drafted token is not


def batch_of(share: float, batch: int, tokens: int) -> list[Stream]:
    chance = random.Random(5)
    return [Stream.drawn([(share, tokens)], chance) for _ in range(batch)]


@pytest.mark.parametrize("batch", [1, 4, 16, 64, 128, 256])
@pytest.mark.parametrize("times", [FREE, DEAR])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_never_slower_than_none(batch: int, times: Roofline, share: float) -> None:
    streams = batch_of(share, batch, 600)
    assert play(Survival(), streams, times, 8).speedup >= 0.98


@pytest.mark.parametrize("batch", [1, 4, 16, 64])
@pytest.mark.parametrize("times", [FREE, DEAR])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_near_the_best_fixed_length(batch: int, times: Roofline, share: float) -> None:
    """Within 10 %, learning included; most cases lie within 5 %."""
    streams = batch_of(share, batch, 1500)
    lengths = (1, 2) if batch == 64 else (1, 2, 3, 4, 5, 6, 8)
    best = max(1.0, *(play(Fixed(), streams, times, k).speedup for k in lengths))
    assert play(Survival(), streams, times, 8).speedup >= 0.9 * best


@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_trees_are_counted_by_their_depth(batch: int, share: float) -> None:
    """Of two tokens a level: near the best fixed number of tokens, and never slower than none."""
    streams = batch_of(share, batch, 1500)
    for stream in streams:
        stream.width = 2
    best = max(1.0, *(play(Fixed(), streams, FREE, k).speedup for k in (2, 4, 6, 8)))
    assert play(Survival(), streams, FREE, 8).speedup >= max(0.98, 0.88 * best)


def test_beats_every_fixed_length_where_sequences_differ() -> None:
    chance = random.Random(7)
    shares = [0.95] * 16 + [0.05] * 48
    streams = [Stream.drawn([(share, 1200)], chance) for share in shares]
    best = max(1.0, *(play(Fixed(), streams, FREE, k).speedup for k in (1, 2, 3)))
    assert play(Survival(), streams, FREE, 8).speedup >= 1.1 * best


def test_returns_when_acceptance_does() -> None:
    chance = random.Random(8)
    streams = [Stream.drawn([(0.0, 600), (0.95, 3000)], chance) for _ in range(4)]
    played = play(Survival(), streams, Roofline(row=0.02, token=0.03), 8)
    assert played.speedup > 1.5


class Asked(Survival):
    """Counts how often it is asked for lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def plan(self, round_: Round) -> list[int]:
        self.looks += 1
        return super().plan(round_)


def test_looks_seldom_while_drafts_cost_more_than_its_account_holds() -> None:
    """A trial that is due and cannot be paid for is no reason to think in every round."""
    control = Asked()
    played = play(control, batch_of(0.3, 4, 1000), Roofline(token=3.0), 8)
    assert played.speedup >= 0.98
    assert control.looks <= played.rounds / 6


def test_looks_more_seldom_where_a_look_takes_longer() -> None:
    looks = []
    for seconds in (0.0, 0.2):
        times = Roofline(token=3.0)
        costs = Measured()
        for _ in range(4):
            costs.saw_look(seconds)
        control = Asked()
        play(control, batch_of(0.3, 4, 1000), times, 8, costs=costs)
        looks.append(control.looks)
    assert looks[1] < looks[0] / 3
