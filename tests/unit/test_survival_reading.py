"""Survival where a proposer reads a prompt before it drafts: once that is earned, on credit."""

from random import Random

import pytest

from kvarn.speculate.costs import Measured
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.survival import Survival
from kvarn.speculate.part import LengthControl
from kvarn.speculate.trial import Noise, Overlapped, Stream, play

#: about a model of 1B that drafts for one of 8B on an H200; 5 us a token of a prompt is assumed
TIMES = Overlapped(
    plain=(4.3e-3, 24e-6), verify=(5.4e-3, 28e-6), gap=0.8e-3, token=0.9e-3, prompt=5e-6
)
LEARNT, JUDGED = 600, 3000  #: rounds


def speedup(control: LengthControl, batch: int, share: float, prompt: int, output: int) -> float:
    """Over no drafts, the first rounds apart: they learn what reading takes."""
    chance, costs, noise = Random(7), Measured(), Noise(0.1, Random(8))
    streams = [
        Stream.drawn([(share, chance.randint(output // 2, output))], chance) for _ in range(batch)
    ]
    for stream in streams:
        stream.prompt = prompt
    most = 3 if isinstance(control, Fixed) else 5
    rounds, plain, seconds = 0, 0.0, 0.0
    while rounds < LEARNT + JUDGED:
        one = play(control, streams, TIMES, most, noise, costs)
        rounds += one.rounds
        if rounds >= LEARNT:
            plain += (one.rounds + one.accepted / batch) * TIMES.step(batch)
            seconds += one.seconds
    return plain / seconds


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("output", [40, 400])
def test_never_slower_however_long_prompts_are(batch: int, share: float, output: int) -> None:
    """Reading 16,384 tokens takes as long as 19 steps, which is much of 3,000 rounds even if it is
    done once in vain; a fixed length falls to a fiftieth."""
    assert speedup(Survival(), batch, share, 16384, output) >= 0.97
    assert speedup(Survival(), batch, share, 2048, output) >= 0.98


@pytest.mark.parametrize(
    ("batch", "prompt", "output"), [(1, 16384, 400), (8, 128, 400), (8, 2048, 1500)]
)
def test_prompts_are_read_where_that_pays(batch: int, prompt: int, output: int) -> None:
    best = speedup(Fixed(), batch, 0.8, prompt, output)
    assert best > 1.3
    assert speedup(Survival(), batch, 0.8, prompt, output) >= 1.0 + 0.6 * (best - 1.0)


def test_time_to_read_is_no_time_to_draft() -> None:
    costs = Measured()
    for _ in range(3):
        costs.saw_draft(4, 2, 0.004)
    assert costs.reading(100) == 0.0
    costs.saw_draft(4, 2, 9.0, read=1000)  # it compiled, say: seen once, and not believed
    for _ in range(2):
        costs.saw_draft(4, 2, 0.014, read=1000)
    assert costs.draft(4, 2) == pytest.approx(0.004)
    assert costs.draft(4, 3) == pytest.approx(0.006)
    assert costs.reading(2000) == pytest.approx(0.02)
    costs.saw_draft(0, 0, 0.01, read=1000)  # all were behind
    assert costs.reading(1000) == pytest.approx(0.01)


def test_a_draft_that_finds_nothing_is_no_reading() -> None:
    """The few tokens that came since the last draft are read by any: their share of its time says
    nothing of what a prompt takes."""
    costs = Measured()
    for _ in range(20):
        costs.saw_draft(0, 0, 1e-4, read=3, asked=1)
    assert costs.reading(1000) == 0.0
    for _ in range(3):
        costs.saw_draft(0, 0, 1e-3, read=1000, asked=1)
    assert costs.reading(1000) == pytest.approx(1e-3)
