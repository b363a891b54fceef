"""Distributions of lengths [tokens]: fitted to a trace, or given by mean and spread."""

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from statistics import fmean, pstdev
from typing import Protocol

from kvarn.core.errors import ConfigError


class Lengths(Protocol):
    """Something that lengths can be drawn from."""

    def sample(self, rng: Random) -> int:
        """A length of at least 1 [tokens]."""
        ...


@dataclass(slots=True, frozen=True)
class Empirical:
    """The lengths of a trace, by inverse quantiles: between two ranks it is linear."""

    ordered: tuple[int, ...]

    def sample(self, rng: Random) -> int:
        """A length between the trace's shortest and longest."""
        return max(1, round(self.quantile(rng.random())))

    def quantile(self, share: float) -> float:
        """The length at `share` in [0, 1] of the sorted lengths."""
        rank = share * (len(self.ordered) - 1)
        low = math.floor(rank)
        high = min(low + 1, len(self.ordered) - 1)
        return self.ordered[low] + (self.ordered[high] - self.ordered[low]) * (rank - low)


@dataclass(slots=True, frozen=True)
class LogNormal:
    """exp of a normal variable, clipped: what falls outside becomes the nearest bound."""

    mu: float  #: mean of the logarithm
    sigma: float  #: standard deviation of the logarithm
    low: int = 1
    high: int = 1 << 20

    def sample(self, rng: Random) -> int:
        """A length in [low, high]."""
        return min(self.high, max(self.low, round(self.draw(rng))))

    def draw(self, rng: Random) -> float:
        """A positive number, neither rounded nor clipped; for times as well."""
        return math.exp(rng.gauss(self.mu, self.sigma))


def fit_empirical(lengths: Iterable[int]) -> Empirical:
    """The distribution of the given lengths itself."""
    return Empirical(_lengths(lengths))


def fit_lognormal(lengths: Iterable[int]) -> LogNormal:
    """Log-normal by the moments of the logarithms, clipped to what was seen."""
    ordered = _lengths(lengths)
    logs = [math.log(one) for one in ordered]
    return LogNormal(fmean(logs), pstdev(logs), ordered[0], ordered[-1])


def lognormal(mean: float, cv: float) -> LogNormal:
    """Log-normal of a mean and a coefficient of variation (before clipping); cv 0 is constant."""
    if not 0 < mean < math.inf or not 0 <= cv < math.inf:
        raise ConfigError(f"a mean must be above 0 and cv at least 0, got {mean} and {cv}")
    variance = math.log1p(cv**2)
    return LogNormal(math.log(mean) - variance / 2, math.sqrt(variance))


class Zipf:
    """Ranks 0 to n - 1, rank r as often as 1 / (r + 1) ** exponent."""

    def __init__(self, n: int, exponent: float = 1.0) -> None:
        if n < 1 or not 0 <= exponent < math.inf:
            raise ConfigError(
                f"Zipf's law needs at least 1 rank and an exponent of at least 0, got {n} ranks "
                f"and {exponent}"
            )
        self._n, self._exponent = n, exponent
        self._sums = list(accumulate((rank + 1) ** -exponent for rank in range(n)))

    def sample(self, rng: Random) -> int:
        """A rank."""
        return bisect_left(self._sums, rng.random() * self._sums[-1])

    def distinct(self, k: int, rng: Random) -> list[int]:
        """`k` different ranks in the order in which they were drawn.

        Ranks drawn before are drawn again. Where that takes long (few popular ranks, many wanted),
        the rest comes from exponential races (Efraimidis and Spirakis 2006): the same law.
        """
        if k > self._n:
            raise ConfigError(f"there are no {k} different ranks among {self._n}")
        found: dict[int, None] = {}
        for _ in range(8 * k):
            if len(found) == k:
                return list(found)
            found[self.sample(rng)] = None
        left = [rank for rank in range(self._n) if rank not in found]
        # logs of exponential times of rate (rank + 1) ** -exponent, which itself may underflow
        time = {r: math.log(rng.expovariate(1)) + self._exponent * math.log(r + 1) for r in left}
        return [*found, *sorted(left, key=time.__getitem__)][:k]


def _lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    ordered = tuple(sorted(lengths))
    if not ordered or ordered[0] < 1:
        raise ConfigError("a distribution needs one length or more, each at least 1 token")
    return ordered
