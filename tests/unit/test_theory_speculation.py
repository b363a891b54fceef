"""Limits of speculation against simulation and search."""

from itertools import product
from random import Random

import pytest

from kvarn.theory.speculation import (
    acceptance,
    best_length,
    drafts_at_one_position,
    expected_tokens,
    speedup,
    tokens_of_survival,
    tree_bound,
)


def spread(rng: Random, n: int) -> list[float]:
    raw = [rng.random() ** 2 for _ in range(n)]
    return [x / sum(raw) for x in raw]


def test_expected_tokens_is_what_chance_gives() -> None:
    rng, total, rounds = Random(0), 0, 40_000
    for _ in range(rounds):
        kept = 0
        while kept < 4 and rng.random() < 0.7:
            kept += 1
        total += kept + 1
    assert total / rounds == pytest.approx(expected_tokens(0.7, 4), rel=0.01)
    assert expected_tokens(0.7, 4) == pytest.approx(tokens_of_survival([0.7, 0.49, 0.343, 0.2401]))
    assert expected_tokens(1.0, 4) == 5 and expected_tokens(0.0, 4) == 1


def test_acceptance_is_what_rejection_sampling_accepts() -> None:
    rng = Random(1)
    p, q = spread(rng, 8), spread(rng, 8)
    draws = rng.choices(range(8), q, k=40_000)
    kept = sum(rng.random() < min(1.0, p[x] / q[x]) for x in draws)
    assert kept / 40_000 == pytest.approx(acceptance(p, q), abs=0.01)


def test_more_drafts_at_a_position_never_hurt_and_one_is_the_plain_case() -> None:
    rng = Random(2)
    p, q = spread(rng, 8), spread(rng, 8)
    bounds = [drafts_at_one_position(p, q, k) for k in range(1, 6)]
    assert bounds[0] == pytest.approx(acceptance(p, q))
    assert bounds == sorted(bounds) and bounds[-1] <= 1.0 + 1e-9


def test_the_best_length_falls_as_verification_grows() -> None:
    free = best_length(0.8, 0.0, lambda k: 1.0, 8)
    dear = best_length(0.8, 0.0, lambda k: 1.0 + k, 8)
    assert free == (8, pytest.approx(speedup(expected_tokens(0.8, 8), 8, 0.0, 1.0)))
    assert dear == (0, 1.0)
    assert 0 < best_length(0.8, 0.1, lambda k: 1.0 + 0.05 * k, 8)[0] < 8


def test_the_tree_bound_is_the_best_of_all_trees() -> None:
    rng = Random(3)
    chances = {
        path: dict(enumerate(spread(rng, 2)))
        for depth in range(4)
        for path in product(range(2), repeat=depth)
    }
    weight = {(): 1.0}
    for path, after in sorted(chances.items(), key=lambda item: len(item[0])):
        for token, chance in after.items():
            weight[(*path, token)] = weight[path] * chance
    nodes = [path for path in weight if path]

    def best(tree: frozenset[tuple[int, ...]], left: int) -> float:
        value = 1.0 + sum(weight[path] for path in tree)
        if left == 0:
            return value
        open_ = [n for n in nodes if n not in tree and (len(n) == 1 or n[:-1] in tree)]
        return max((best(tree | {n}, left - 1) for n in open_), default=value)

    for count in (1, 2, 3):
        bound = tree_bound(lambda path: chances.get(path, {}), count)
        assert bound == pytest.approx(best(frozenset(), count))
