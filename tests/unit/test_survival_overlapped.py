"""Survival on a machine with what real ones have: plain steps that are planned ahead and replayed,
drafted ones that are not, a price for going back, times that vary, sequences that come and go."""

import random

import pytest

from kvarn.speculate.costs import Measured
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.survival import Survival
from kvarn.speculate.part import LengthControl
from kvarn.speculate.trial import Noise, Overlapped, Stream, play

LAUNCHED = Overlapped()  # an H100 before verify steps were captured
REPLAYED = Overlapped(verify=(6.9e-3, 28e-6), gap=0.8e-3)
BATCHES = (1, 4, 16, 64, 128, 256)
MOST = 5  #: longest draft [tokens]


def speedup(make: type[LengthControl], times: Overlapped, batch: int, share: float, most: int,
            spread: float, turns: int = 4) -> tuple[float, float]:  # fmt: skip
    """Over no drafts: of the first turn, in which all is learnt, and of the others."""
    chance, found = random.Random(7), list[tuple[float, float]]()
    streams = [Stream.drawn([(share, chance.randint(80, 240))], chance) for _ in range(batch)]
    control, costs, noise = make(), Measured(), Noise(spread, random.Random(8))
    for _ in range(turns):
        played = play(control, streams, times, most, noise, costs)
        found.append((played.plain_seconds, played.seconds))
    plain, seconds = (sum(column) for column in zip(*found[1:]))
    return found[0][0] / found[0][1], plain / seconds


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("times", [LAUNCHED, REPLAYED])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.8, 0.95])
def test_never_slower_and_near_the_best(batch: int, times: Overlapped, share: float) -> None:
    """0.98 of none at least, learning aside, and most of the gain of the best fixed length."""
    first, later = speedup(Survival, times, batch, share, MOST, 0.1)
    assert first >= 0.95 and later >= 0.98
    fixed = (speedup(Fixed, times, batch, share, k, 0.1)[1] for k in (1, 2, 3, 5))
    best = max(1.0, *fixed)
    if best > 1.15:
        assert later - 1.0 >= 0.85 * (best - 1.0)


@pytest.mark.parametrize("batch", [4, 64, 256])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_other_noise(batch: int, share: float, spread: float) -> None:
    assert speedup(Survival, LAUNCHED, batch, share, MOST, spread)[1] >= 0.975


def test_steps_with_drafts_are_not_taken_for_plain_ones() -> None:
    costs = Measured()
    for _ in range(3):
        costs.saw_verifying(16, 0.012)
        costs.saw_plain(16, 0.009)  # the first behind it
        costs.saw_plain(16, 0.006)
    assert costs.step(16) == pytest.approx(0.006)
    assert costs.verifying(16) == pytest.approx(0.012)
    assert costs.back() == pytest.approx(0.003)
    assert costs.knows(16) and costs.knows(20) and costs.knows(8)
    assert not costs.knows(32) and not costs.knows(4)


def test_what_was_seen_once_is_not_believed() -> None:
    """The first step of a size may have captured it."""
    costs = Measured()
    for seconds in (0.5, 0.01):
        costs.saw_verifying(8, seconds)
    assert costs.verifying(8) == pytest.approx(0.01)
    costs.saw_verifying(64, 0.5)
    assert costs.verifying(64) == pytest.approx(0.01) and costs.reach() == 8
