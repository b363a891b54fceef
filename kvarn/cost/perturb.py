"""`Perturbed`: a cost model whose terms are wrong on purpose, to see which conclusions survive.

A claim "A beats B by x" is worth what is left of it when every term of the time model is off by
as much as it was against measurements: simulate both under each of `draws`, and report the 5th and
95th percentile of the ratio.
"""

import random
from collections.abc import Mapping
from dataclasses import replace

from kvarn.core.errors import ConfigError, nearest
from kvarn.cost.shape import CostModel, Estimate, StepShape

#: terms of `Estimate` that add up to its seconds
TERMS = ("host", "linear", "prefill", "decode", "experts", "comm")


class Perturbed:
    """A `CostModel` with each term multiplied by its factor; power stays as it is."""

    def __init__(self, model: CostModel, factors: Mapping[str, float]) -> None:
        _check(factors)
        if any(factor <= 0 for factor in factors.values()):
            raise ConfigError(f"factors must be positive, got {dict(factors)}")
        self.name = f"{model.name}, perturbed"
        self.model = model
        self.factors = {term: factors.get(term, 1.0) for term in TERMS}

    def idle_watts(self) -> float:
        """As the model's own [W]."""
        return self.model.idle_watts()

    def step(self, shape: StepShape) -> Estimate:
        """The model's estimate with scaled terms; energy grows with the whole time."""
        plain = self.model.step(shape)
        scaled = {term: getattr(plain, term) * factor for term, factor in self.factors.items()}
        estimate = replace(plain, **scaled)
        if plain.seconds > 0:
            estimate.joules = plain.joules * estimate.seconds / plain.seconds
        return estimate


def draws(sigma_by_term: Mapping[str, float], n: int, seed: int) -> list[dict[str, float]]:
    """`n` sets of lognormal factors, of median 1 and log-deviation sigma; 1 for other terms.

    The same seed gives the same sets, so that two policies meet the same errors.
    """
    _check(sigma_by_term)
    if n < 1 or any(sigma < 0 for sigma in sigma_by_term.values()):
        raise ConfigError(f"draws needs n >= 1 and sigmas >= 0, got {n}, {dict(sigma_by_term)}")
    rng = random.Random(seed)
    return [
        {term: rng.lognormvariate(0.0, sigma_by_term.get(term, 0.0)) for term in TERMS}
        for _ in range(n)
    ]


def _check(terms: Mapping[str, float]) -> None:
    for term in terms:
        if term not in TERMS:
            raise ConfigError(f"unknown term {term!r} of an estimate{nearest(term, TERMS)}")
