"""Length controls on modelled machines: what they choose, and that they never cost much."""

from random import Random
from typing import Any

import pytest

from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.speculate.costs import Measured
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.gammatune import GammaTune, GammaTunePlus, Rates
from kvarn.speculate.length.survival import Survival
from kvarn.speculate.part import Round, Verified


def seqs(n: int) -> list[Seq]:
    return [Seq(i, Request(str(i), [1]), 0, [1], 1 << 30, (0, i)) for i in range(n)]


def gpu_step(rows: int, drafts: bool) -> float:
    """A roofline's shape, and a fixed price for not overlapping [s]."""
    return max(0.006, 0.00004 * rows) + (0.001 if drafts else 0.0)


def play(control: Any, n: int, share: float, rounds: int, noise: float = 0.0) -> float:
    """Tokens a second over those of plain steps, with i.i.d. acceptance `share`."""
    chance, running, costs = Random(n), seqs(n), Measured()
    tokens, seconds = 0, 0.0
    for i in range(rounds):
        lengths = [0] * n
        if not control.rests():
            lengths = control.plan(Round(running, [8] * n, 0, costs))
        assert all(0 <= k <= 8 for k in lengths)
        drafts = sum(lengths)
        step = gpu_step(n + drafts, drafts > 0) * (1 + noise * chance.random())
        if i in (1, 3, 5):
            step += 0.3  # something compiles
        records = []
        for seq, k in zip(running, lengths, strict=True):
            accepted = 0
            while accepted < k and chance.random() < share:
                accepted += 1
            records.append(Verified(seq.id, k, accepted, [0.5] * k))
            tokens += accepted + 1
        costs.saw_step(n + drafts, step)
        if drafts:
            control.observe(records, step, 0.0)
        seconds += step if step < 0.2 else step - 0.3
    plain = n / (gpu_step(n, False) * (1 + noise / 2))
    return tokens / seconds / plain


@pytest.mark.parametrize("n", [1, 4, 16, 64, 128, 256])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_survival_is_never_much_slower_than_none(n: int, share: float, noise: float) -> None:
    assert play(Survival(), n, share, 3000, noise) > 0.98


@pytest.mark.parametrize("n, share", [(1, 0.8), (16, 0.8), (64, 0.9)])
def test_survival_comes_near_the_best_fixed_length(n: int, share: float) -> None:
    class Always(Fixed):
        def __init__(self, k: int) -> None:
            self.k = k

        def plan(self, round_: Round) -> list[int]:
            return [self.k] * len(round_.seqs)

    best = max(play(Always(k), n, share, 2000) for k in range(1, 9))
    assert play(Survival(), n, share, 2000) > 0.9 * best > 0.9


def test_survival_comes_back_when_acceptance_does() -> None:
    control = Survival()
    assert play(control, 4, 0.0, 500) < 1.0
    assert play(control, 4, 0.9, 3000) > 1.5


def test_gammatune_follows_the_published_trace() -> None:
    control, one = GammaTune(Rates(first=3)), seqs(1)
    lengths = []
    for accepted in (3, 2, 3):
        (drafted,) = control.plan(Round(one, [16], 0, Measured()))
        control.observe([Verified(0, drafted, accepted)], 0.0, 0.0)
        lengths.append(control.plan(Round(one, [16], 0, Measured()))[0])
    assert lengths == [5, 3, 5]
    assert control._states[0].average == pytest.approx(2.7)
    control.forget(0)
    assert not control._states


def test_gammatune_plus_stops_when_unsure() -> None:
    control = GammaTunePlus()
    assert control.goes_on([]) and control.goes_on([0.9, 0.5])
    assert not control.goes_on([0.9, 0.3])


def test_costs_forget_what_compiled() -> None:
    costs = Measured()
    assert costs.step(4) == 0.0
    for seconds in (0.5, 0.01, 0.01):
        costs.saw_step(4, seconds)
    assert costs.step(4) == 0.01
    costs.saw_step(8, 0.02)
    assert costs.step(6) == pytest.approx(0.015)
    assert costs.step(12) == pytest.approx(0.03)
    assert costs.step(1) == 0.01
