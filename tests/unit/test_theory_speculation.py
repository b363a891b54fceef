"""Limits of speculation against simulation, exhaustive search and linear programmes."""

import math
import random
from itertools import combinations, product

import pytest

from kvarn.theory.speculation import (
    Distribution,
    acceptance,
    best_length,
    drafts_at_one_position,
    expected_tokens,
    speedup,
    tokens_of_survival,
    tree_bound,
)
from kvarn.theory.verification import (
    Model,
    Path,
    best_of_several,
    block_wise,
    outer_bound,
    rejections,
    token_wise,
)

VOCABULARY, DRAFTS = 8, 3


def distribution(chance: random.Random, tokens: int, peak: float = 1.5) -> list[float]:
    """A random one; the greater `peak`, the more of it on few tokens."""
    raw = [chance.expovariate(1.0) ** peak for _ in range(tokens)]
    return [x / sum(raw) for x in raw]


def model(seed: int, tokens: int = VOCABULARY) -> Model:
    """Another distribution after every path."""
    known = dict[Path, list[float]]()

    def after(path: Path) -> Distribution:
        if path not in known:
            known[path] = distribution(random.Random(f"{seed} {path}"), tokens)
        return known[path]

    return after


def draw(chance: random.Random, p: Distribution) -> int:
    return chance.choices(range(len(p)), p)[0]


def mean_accepted(p: Model, q: Model, rounds: int, block: bool) -> float:
    """By rolling dice: token-wise rejection, or block verification as its authors state it."""
    chance, total = random.Random(1), 0
    for _ in range(rounds):
        path, ratio, accepted = list[int](), 1.0, 0
        for i in range(DRAFTS):
            token = draw(chance, q(tuple(path)))
            of = p(tuple(path))[token] / q(tuple(path))[token]
            path.append(token)
            if not block:
                if chance.random() > of:
                    break
                accepted = i + 1
                continue
            ratio = min(1.0, ratio * of)
            stays = ratio
            if i + 1 < DRAFTS:
                here, drawn = p(tuple(path)), q(tuple(path))
                gain = sum(max(ratio * a - b, 0.0) for a, b in zip(here, drawn))
                stays = gain / (gain + 1.0 - ratio) if ratio < 1.0 or gain > 0.0 else 1.0
            if chance.random() < stays:
                accepted = i + 1
        total += accepted
    return total / rounds


@pytest.mark.parametrize("seed", [1, 2])
def test_verifiers_match_simulation(seed: int) -> None:
    p, q = model(seed), model(seed + 100)
    for block, exact in ((False, token_wise), (True, block_wise)):
        wanted = exact(p, q, DRAFTS)
        assert mean_accepted(p, q, 60_000, block) == pytest.approx(wanted, rel=0.015)


def test_verifiers_are_ordered() -> None:
    strict = 0
    for seed in range(20):
        p, q = model(seed, 4), model(seed + 100, 4)
        single, block = token_wise(p, q, DRAFTS), block_wise(p, q, DRAFTS)
        assert single <= block + 1e-12 <= outer_bound(p, q, DRAFTS) + 1e-9
        strict += single < block - 1e-6
    assert strict > 10
    assert token_wise(p, p, DRAFTS) == pytest.approx(DRAFTS)


def test_one_draft_is_accepted_with_the_overlap() -> None:
    p, q = model(3), model(4)
    share = acceptance(p(()), q(()))
    for exact in (token_wise, block_wise, outer_bound):
        assert exact(p, q, 1) == pytest.approx(share)


def test_block_verification_is_the_best_rule() -> None:
    """Two tokens, two drafts: the optimum over all joint laws of drafts and output."""
    linprog = pytest.importorskip("scipy.optimize").linprog
    for seed in range(6):
        p, q = model(seed, 2), model(seed + 50, 2)
        paths = list(product(range(2), repeat=2))
        drawn = {x: q(())[x[0]] * q(x[:1])[x[1]] for x in paths}
        wanted = {y: p(())[y[0]] * p(y[:1])[y[1]] for y in paths}
        # x: drafts, y: what the sequence becomes in the end, n: how many drafts were kept; what
        # follows them is unlike the next draft or free, and everything after is by the target
        cells = [(x, n, y) for x in paths for n in range(3) for y in paths if x[:n] == y[:n]]
        rows = [[float(c[0] == x) for c in cells] for x in paths]
        right = [drawn[x] for x in paths]
        rows += [[float(c[2] == y) for c in cells] for y in paths]
        right += [wanted[y] for y in paths]
        for x in paths:  # after a rejection at the first draft the second token is the target's
            for first in range(2):
                share = p((first,))
                rows.append(
                    [
                        (share[1 - c[2][1]] * (1.0 if c[2][1] == 0 else -1.0))
                        if c[0] == x and c[1] == 0 and c[2][0] == first
                        else 0.0
                        for c in cells
                    ]
                )
                right.append(0.0)
        found = linprog([-float(c[1]) for c in cells], A_eq=rows, b_eq=right, method="highs")
        assert found.success
        assert -found.fun == pytest.approx(block_wise(p, q, 2), abs=1e-7)


def test_rejections_are_those_of_the_common_rule() -> None:
    p, q, chance, tokens = model(5), model(6), random.Random(2), 3
    total, rounds = 0, 40_000
    for _ in range(rounds):
        path: Path = ()
        for _ in range(tokens):
            here, drawn = p(path), q(path)
            token = draw(chance, drawn)
            if chance.random() > here[token] / drawn[token]:
                total += 1
                token = draw(chance, [max(a - b, 0.0) for a, b in zip(here, drawn)])
            path = (*path, token)
    assert total / rounds == pytest.approx(rejections(p, q, tokens), rel=0.015)


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_several_drafts_at_one_position(drafts: int) -> None:
    pytest.importorskip("scipy.optimize")
    chance = random.Random(drafts)
    for _ in range(8):
        p, q = distribution(chance, 4), distribution(chance, 4)
        best = best_of_several(p, q, drafts)
        assert best <= drafts_at_one_position(p, q, drafts) + 1e-9
        assert best >= acceptance(p, q) - 1e-9
        if drafts == 1:
            assert best == pytest.approx(acceptance(p, q))


def test_trees_against_every_tree() -> None:
    after = model(7, 3)
    paths = [path for depth in (1, 2, 3) for path in product(range(3), repeat=depth)]
    likely = {path: math.prod(after(path[:i])[path[i]] for i in range(len(path))) for path in paths}

    def children(path: Path) -> dict[int, float]:
        return dict(enumerate(after(path))) if len(path) < 3 else {}

    for nodes in (1, 2, 3, 4):
        trees = (
            tree
            for tree in map(set, combinations(paths, nodes))
            if all(len(path) == 1 or path[:-1] in tree for path in tree)
        )
        best = max(1.0 + sum(likely[path] for path in tree) for tree in trees)
        found = tree_bound(
            lambda path: dict(enumerate(after(path))) if len(path) < 3 else {}, nodes
        )
        assert found == pytest.approx(best)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_expected_tokens(share: float) -> None:
    chance, rounds = random.Random(3), 30_000
    total = rounds
    for _ in range(rounds):
        for _ in range(4):
            if chance.random() >= share:
                break
            total += 1
    assert total / rounds == pytest.approx(expected_tokens(share, 4), rel=0.01)
    assert tokens_of_survival([share**i for i in range(1, 5)]) == pytest.approx(
        expected_tokens(share, 4)
    )
    if share < 1.0:
        assert expected_tokens(share, 200) <= 1.0 / (1.0 - share) + 1e-9


def test_best_length() -> None:
    def free(drafts: int) -> float:
        return 1.0

    def full(drafts: int) -> float:  # a step that is bound by computation
        return 1.0 + drafts

    for share in (0.2, 0.6, 0.9):
        for draft in (0.05, 0.3, 0.95):
            length, gain = best_length(share, draft, free, 12)
            every = [speedup(expected_tokens(share, k), k, draft, 1.0) for k in range(13)]
            assert (length, gain) == (every.index(max(every)), max(every))
            assert (length > 0) == (share > draft)  # one draft pays iff share exceeds its cost
        assert best_length(share, 0.0, full, 12) == (0, 1.0)
