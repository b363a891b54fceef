"""What verification that does not change the output can reach, from the two models' probabilities.

One path of drafts: p and q are the target's and the drafter's distributions of the next token
after a path. Token-wise rejection is the common rule; block verification (arXiv 2403.10444) is the
best of all lossless rules; the outer bound looks at the distributions of whole paths only. Several
drafts at one position: a linear programme over couplings (SpecTr, arXiv 2310.15141), which needs
scipy. Sizes are small: all paths are visited.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

from kvarn.core.errors import ConfigError
from kvarn.theory.speculation import Distribution, acceptance

Path = tuple[int, ...]
#: distribution of the token after a path
Model = Callable[[Path], Distribution]


def token_wise(p: Model, q: Model, drafts: int) -> float:
    """Accepted tokens of a chain of `drafts`, each judged by itself: sum of E[prod min(1, p/q)]."""
    return _accepted(p, q, drafts, lambda before, ratio: before * min(1.0, ratio))


def block_wise(p: Model, q: Model, drafts: int) -> float:
    """Accepted tokens under block verification, which no lossless rule exceeds: sum of E[pi_i].

    pi_i = min(1, pi_(i-1) p/q), pi_0 = 1.
    """
    return _accepted(p, q, drafts, lambda before, ratio: min(1.0, before * ratio))


def outer_bound(p: Model, q: Model, drafts: int) -> float:
    """Sum over lengths of 1 - TV of the distributions of whole paths: above every rule."""
    total = 0.0
    reached: list[tuple[Path, float, float]] = [((), 1.0, 1.0)]
    for _ in range(drafts):
        reached = [
            ((*path, token), likely * p(path)[token], drawn * chance)
            for path, likely, drawn in reached
            for token, chance in enumerate(q(path))
        ]
        total += sum(min(likely, drawn) for _, likely, drawn in reached)
    return total


def rejections(p: Model, q: Model, tokens: int) -> float:
    """Fewest rejections in expectation while `tokens` tokens are made, for rules that judge token
    by token: sum of E[TV(p, q)] along paths of the target; the common rule meets it (2411.00841).
    """
    total = 0.0
    reached: dict[Path, float] = {(): 1.0}
    for _ in range(tokens):
        total += sum(w * (1.0 - acceptance(p(path), q(path))) for path, w in reached.items())
        reached = {
            (*path, token): weight * chance
            for path, weight in reached.items()
            for token, chance in enumerate(p(path))
        }
    return total


def best_of_several(p: Distribution, q: Distribution, drafts: int) -> float:
    """Most probability of emitting one of `drafts` independent tokens of q, output exactly p.

    A linear programme over the drafted set and the output; sizes grow as tokens ** drafts.
    """
    sets = dict(_sets(q, drafts))
    keys, tokens = list(sets), range(len(p))
    gain = [-1.0 if token in key else 0.0 for key in keys for token in tokens]
    rows = [[1.0 if k == key else 0.0 for k in keys for _ in tokens] for key in keys]
    rows += [[1.0 if t == token else 0.0 for _ in keys for t in tokens] for token in tokens]
    found = _linprog()(gain, A_eq=rows, b_eq=[*sets.values(), *p], method="highs")
    if not found.success:
        raise ConfigError(f"p and q must be distributions over the same tokens: {found.message}")
    return float(-found.fun)


def _linprog() -> Any:
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        raise ConfigError("linear programmes need scipy: pip install kvarn[theory]") from error
    return linprog


def _sets(q: Distribution, drafts: int) -> Iterator[tuple[frozenset[int], float]]:
    """Sets of drafted tokens with their probabilities; what stands in a set is all that counts."""
    found = dict[frozenset[int], float]()
    for drawn in product(range(len(q)), repeat=drafts):
        key = frozenset(drawn)
        found[key] = found.get(key, 0.0) + prod(q[token] for token in drawn)
    yield from found.items()


def _accepted(p: Model, q: Model, drafts: int, stands: Callable[[float, float], float]) -> float:
    """Sum over lengths of the expectation of `stands`, carried along drafted paths."""
    total = 0.0
    reached: list[tuple[Path, float, float]] = [((), 1.0, 1.0)]
    for _ in range(drafts):
        following = list[tuple[Path, float, float]]()
        for path, drawn, standing in reached:
            wanted: Sequence[float] = p(path)
            for token, chance in enumerate(q(path)):
                if chance > 0.0:
                    now = stands(standing, wanted[token] / chance)
                    following.append(((*path, token), drawn * chance, now))
        reached = following
        total += sum(drawn * standing for _, drawn, standing in reached)
    return total
