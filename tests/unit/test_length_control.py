"""Length controls: the rules of their papers, and what they make of streams in modelled time."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from kvarn.core.errors import ConfigError
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.speculate.length import utility
from kvarn.speculate.length.baselines import Confidence, Heuristic
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.gammatune import GammaTune, GammaTunePlus, Rates
from kvarn.speculate.length.specdec_pp import GREATEST, LEAST, SpecDecPP, threshold_of
from kvarn.speculate.length.utility import Utility
from kvarn.speculate.part import Costs, LengthControl, Round, Verified
from kvarn.speculate.trial import Roofline, Stream, play


def seq(number: int) -> Seq:
    return Seq(number, Request(str(number), [0]), 0, [0], 99, (0, number))


def asked(control: LengthControl, costs: Costs, count: int = 1, room: int = 16) -> list[int]:
    return control.plan(Round([seq(i) for i in range(count)], [room] * count, 0, costs))


def best_fixed(streams: Sequence[Stream], times: Costs, most: int = 12) -> float:
    """Speedup of the best length in hindsight, none included."""
    return max(1.0, *(play(Fixed(), streams, times, k).speedup for k in range(1, most + 1)))


# GammaTune


def test_gammatune_follows_its_algorithm() -> None:
    control, times = GammaTune(Rates(eta=0.3, delta=2, above=0, first=3)), Roofline()
    lengths, averages = list[int](), list[float]()
    assert asked(control, times) == [3]
    for accepted in (3, 2, 3):
        drafted = asked(control, times)[0]
        control.observe([Verified(0, drafted, accepted)], 1.0, 0.0)
        if drafted == 3 and accepted == 3:
            averages.append(control._state(0).average)
        lengths += asked(control, times)
        averages.append(control._state(0).average)
    assert lengths == [5, 3, 5]
    assert averages[-2:] == pytest.approx([2.7, 2.7])


def test_gammatune_recovers_fast() -> None:
    runs = ([12] * 20 + [1] * 40) * 5
    control = GammaTune(Rates(delta=2, above=0))
    first = play(control, [Stream.of_runs(runs)], Roofline()).first
    for before, after in pairwise(first):
        drafted, accepted = before
        if accepted < drafted:  # one round down: near the average at once
            assert after[0] <= 8
        elif drafted < 16:
            assert after[0] in (drafted + 2, 16) or after == first[-1]


@pytest.mark.parametrize("token", [0.0, 0.02, 0.1, 0.25])
def test_gammatune_near_best_fixed(token: float) -> None:
    """Where acceptance is stationary a fixed length is best; where it changes, none is."""
    chance, times = random.Random(1), Roofline(row=0.0, fixed=0.0, token=token)
    for share in (0.5, 0.7, 0.85, 0.95):
        best = max((1 - share ** (k + 1)) / (1 - share) / (1 + k * token) for k in range(1, 17))
        played = play(GammaTune(), [Stream.drawn([(share, 8000)], chance)], times)
        assert played.speedup >= 0.88 * best
    stream = Stream.drawn([(0.98, 50), (0.1, 50)] * 20, chance)
    assert play(GammaTune(), [stream], times).speedup >= 0.99 * best_fixed([stream], times, 16)


def test_gammatune_grows_by_what_drafts_are_worth() -> None:
    """`delta` costs 0.35 of a step, and what is drafted beyond the average 0.07."""
    for token, grown, fallen in ((0.0, 16, 16), (0.05, 14, 2), (0.25, 2, 1)):
        control, times = GammaTune(), Roofline(row=0.0, fixed=0.0, token=token)
        first = asked(control, times)[0]
        assert first == (round(0.35 / token) if token else 16)
        control.observe([Verified(0, first, first)], 1.0, 0.0)
        assert asked(control, times) == [grown]
        for _ in range(9):
            control.observe([Verified(0, grown, 0)], 1.0, 0.0)
        assert asked(control, times) == [fallen]


@pytest.mark.parametrize("token", [0.02, 0.1, 0.25])
def test_gammatune_recovers_in_three_rounds(token: float) -> None:
    """After 50 rounds in which one draft in five stands come some in which all do: three rounds
    lead to a length with 0.9 of the best speed at an acceptance of 0.95. One failure leads back to
    the average, and two more to the lengths of the poor regime."""
    chance, times = random.Random(3), Roofline(row=0.0, fixed=0.0, token=token)
    low = [next(i for i in range(99) if chance.random() >= 0.2) for _ in range(50)]
    speed = {k: (1 - 0.95 ** (k + 1)) / 0.05 / (1 + k * token) for k in range(1, 17)}
    played = play(GammaTune(), [Stream.of_runs([*low, 800, *low, 800, *low])], times).first
    whole = {i for i, (drafted, stood) in enumerate(played) if drafted == stood == 16}
    begins, ends = ([i for i in whole if i + by not in whole] for by in (-1, 1))
    for begin in begins:
        failed = next(i for i in range(begin, 0, -1) if played[i - 1][1] < played[i - 1][0])
        later = [drafted for drafted, _ in played[failed + 1 : failed + 4]]
        assert max(speed[k] for k in later) >= 0.9 * max(speed.values())
    for end in ends[:2]:  # the last draft of the good regime fails on its way
        assert played[end + 1][0] == 16 > played[end + 1][1]
        assert played[end + 2][0] <= 13
        assert min(drafted for drafted, _ in played[end + 3 : end + 6]) <= 6


def test_gammatune_plus_stops_where_it_doubts() -> None:
    control = GammaTunePlus()
    assert control.goes_on([]) and control.goes_on([0.9, 0.41])
    assert not control.goes_on([0.9, 0.39])


# baselines


def test_heuristic_grows_by_two_and_shrinks_by_one() -> None:
    control, times, lengths = Heuristic(), Roofline(), list[int]()
    for accepted in (5, 3, 3, 0, 0, 0, 0, 0, 0, 0):
        drafted = asked(control, times)[0]
        lengths.append(drafted)
        control.observe([Verified(0, drafted, min(accepted, drafted))], 1.0, 0.0)
    assert lengths == [5, 7, 6, 5, 4, 3, 2, 1, 1, 1][: len(lengths)]


def test_confidence_stops_at_the_first_doubt() -> None:
    assert Confidence().goes_on([]) and Confidence().goes_on([0.1, 0.4])
    assert not Confidence().goes_on([0.9, 0.3])


# SpecDec++


def test_specdec_threshold_follows_costs() -> None:
    free = threshold_of(Roofline(token=0.0), 1, 1)
    cheap = threshold_of(Roofline(read=1.0, fixed=0.0, token=0.25), 1, 1)
    dear = threshold_of(Roofline(read=1.0, fixed=0.0, token=0.95), 1, 1)
    full = threshold_of(Roofline(read=1.0, fixed=0.0), 100, 100)
    assert free == GREATEST
    assert cheap == pytest.approx(0.75)  # c1 = 0.25, c2 = 0.75
    assert dear == LEAST
    assert full == pytest.approx(0.5)  # a row of each costs as much as a step without


def test_specdec_stops_on_the_product() -> None:
    control = SpecDecPP(threshold=0.5)
    assert control.goes_on([]) and not control.goes_on([0.1])
    assert control.goes_on([0.8, 0.8]) and not control.goes_on([0.8, 0.8, 0.7])
    with pytest.raises(ConfigError, match="probability"):
        SpecDecPP(threshold=1.5)


def test_specdec_beats_fixed_lengths_where_confidence_tells() -> None:
    """Confidence that is the probability itself; the paper gains 7 % to 11 % at c2/c1 = 3.7."""
    chance = random.Random(2)
    sure = [chance.choice([0.97, 0.97, 0.97, 0.9, 0.5]) for _ in range(8000)]
    stream = Stream([chance.random() < p for p in sure], sure)
    times = Roofline(read=1.0, row=0.0, fixed=0.0, token=1.0 / 4.7)
    fixed = max(play(Fixed(), [stream], times, k).speedup for k in range(1, 11))
    assert play(SpecDecPP(), [stream], times, 20).speedup >= 1.05 * fixed


# utility


class Table:
    """Step times by length, for one sequence."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds

    def step(self, rows: int) -> float:
        return self.seconds[rows - 1]

    def verifying(self, rows: int) -> float:
        return self.seconds[rows - 1]

    def back(self) -> float:
        return 0.0

    def look(self) -> float:
        return 0.0

    def knows(self, rows: int) -> bool:
        return True

    def reach(self) -> int:
        return max(self.seconds)

    def draft(self, seqs: int, most: int) -> float:
        return 0.0


def scripted(seconds: dict[int, float], tokens: Callable[[int], int], rounds: int) -> list[int]:
    """Lengths by round; a round of length k brings tokens(k). Rests count as 0."""
    control, times, found = Utility(), Table(seconds), list[int]()
    for _ in range(rounds):
        length = 0 if control.rests() else asked(control, times)[0]
        found.append(length)
        if length:
            control.observe([Verified(0, length, tokens(length) - 1)], times.step(length + 1), 0.0)
    return found


def phases(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(length, rounds) of stretches."""
    found = list[tuple[int, int]]()
    for one in lengths:
        if found and found[-1][0] == one:
            found[-1] = one, found[-1][1] + 1
        else:
            found.append((one, 1))
    return found


def test_utility_tests_seldom_where_drafts_lose() -> None:
    seconds = {k: 1.0 + 0.5 * k for k in range(8)}  # one token a round whatever is drafted
    lengths = scripted(seconds, lambda k: 1, 250)
    assert sum(1 for k in lengths if k) <= 20
    spans = [rounds for k, rounds in phases(lengths) if k == 0]
    wanted = [2 * utility.SET, 4 * utility.SET, 8 * utility.SET]
    assert spans[:3] == pytest.approx(wanted, abs=2)  # and a round that times the plain step
    taken = sum(seconds[k] for k in lengths)
    assert taken <= 1.07 * len(lengths)


def test_utility_climbs_to_the_best_length() -> None:
    speeds = {0: 1.0, 1: 1.2, 2: 1.4, 3: 1.7, 4: 2.0, 5: 2.4, 6: 2.0, 7: 1.5}
    lengths = scripted({k: (k + 1) / v for k, v in speeds.items()}, lambda k: k + 1, 99)
    trial, found = utility.TRIAL, phases(lengths)
    assert found[:3] == [(3, trial), (4, trial), (5, trial)]
    assert found[3] == (6, trial)
    assert found[4][0] == 5 and found[4][1] >= utility.SET


def test_utility_comes_down_to_what_pays() -> None:
    speeds = {0: 1.0, 1: 1.3, 2: 1.1, 3: 0.8}
    lengths = scripted({k: (k + 1) / v for k, v in speeds.items()}, lambda k: k + 1, 40)
    assert [k for k, _ in phases(lengths)][:4] == [3, 1, 2, 1]


def test_utility_returns_when_acceptance_does() -> None:
    chance = random.Random(3)
    stream = Stream.drawn([(0.05, 400), (0.9, 4000)], chance)
    times = Roofline(read=1.0, row=0.3, fixed=0.0)
    played = play(Utility(), [stream], times)
    assert played.speedup > 1.2
    assert any(drafted > 0 for drafted, _ in played.first[-100:])


def test_utility_is_the_ratio_of_speeds() -> None:
    """Utility of a fixed length, tokens by time in plain steps, against the measured speedup."""
    chance, pairs = random.Random(4), list[tuple[float, float]]()
    for share in (0.2, 0.5, 0.8, 0.95):
        for row in (0.05, 0.3, 0.6):
            stream = Stream.drawn([(share, 2000)], chance)
            played = play(Fixed(), [stream], Roofline(row=row), 3)
            trial = utility._Trial(3, 0)
            trial.tokens = played.accepted + played.rounds
            trial.slices = played.seconds / Roofline(row=row).step(1)
            pairs.append((trial.utility, played.speedup))
    assert all(told == pytest.approx(true, rel=1e-6) for told, true in pairs)


def test_utility_in_a_batch_tests_by_turns() -> None:
    control, times = Utility(), Roofline(row=0.001)
    lengths = asked(control, times, 40)
    assert sum(1 for k in lengths if k) == 4
    assert sum(1 for k in asked(Utility(), times, 3) if k) == 1
