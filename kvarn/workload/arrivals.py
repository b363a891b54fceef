"""Arrival processes: endless iterators of rising times [s], from 0 on.

Rates are in requests per second. Nothing is rescaled: the number of arrivals in a time is random,
as it is in the process.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count, repeat
from random import Random
from typing import Any

from kvarn.core.errors import ConfigError, nearest


def poisson(rng: Random, rate: float) -> Iterator[float]:
    """Independent arrivals: exponential gaps."""
    return gamma(rng, rate, 1.0)


def gamma(rng: Random, rate: float, cv: float) -> Iterator[float]:
    """Renewal process of gamma gaps with coefficient of variation `cv`: 1 is Poisson."""
    _positive(rate=rate, cv=cv)
    shape = 1 / cv**2
    return _summed(lambda: rng.gammavariate(shape, 1 / (rate * shape)))


def fixed(rng: Random, rate: float) -> Iterator[float]:
    """Every 1 / rate seconds; nothing is random."""
    _positive(rate=rate)
    return (i / rate for i in count())


def all_at_once(rng: Random) -> Iterator[float]:
    """Everything at time 0; nothing is random."""
    return repeat(0.0)


def markov_modulated(
    rng: Random, rates: Sequence[float], stays: Sequence[float]
) -> Iterator[float]:
    """Poisson whose rate changes: state i lasts an exponential time of mean `stays[i]` [s].

    States follow each other in turn, from the first on. The mean rate is
    sum(rate * stay) / sum(stay). A rate of 0 is a pause.
    """
    if len(rates) != len(stays) or not rates:
        raise ConfigError(f"give one stay a rate, got {len(rates)} rates and {len(stays)} stays")
    for stay in stays:
        _positive(stays=stay)
    if not all(0 <= rate < math.inf for rate in rates) or not any(rates):
        raise ConfigError(f"rates must be 0 or more, and one above 0; got {list(rates)}")
    return _modulated(rng, rates, stays)


def _modulated(rng: Random, rates: Sequence[float], stays: Sequence[float]) -> Iterator[float]:
    start = 0.0
    for state in count():
        rate, stay = rates[state % len(rates)], stays[state % len(stays)]
        end = start + rng.expovariate(1 / stay)
        now = start + rng.expovariate(rate) if rate else end
        while now < end:  # exponential gaps forget: those cut off by `end` may start anew
            yield now
            now += rng.expovariate(rate)
        start = end


def diurnal(
    rng: Random, rate: float, swing: float, period: float = 86400.0, phase: float = 0.0
) -> Iterator[float]:
    """Poisson with rate(t) = rate (1 + swing sin(2 pi (t - phase) / period)), by thinning.

    `swing` in [0, 1]: the peak is 1 + swing times the mean, at phase + period / 4 (Lewis and
    Shedler 1979: candidates at the peak rate, kept with probability rate(t) / peak).
    """
    _positive(rate=rate, period=period)
    if not 0 <= swing <= 1:
        raise ConfigError(f"swing must be in [0, 1], got {swing}")
    return (
        time
        for time in poisson(rng, rate * (1 + swing))
        if rng.random() * (1 + swing) < 1 + swing * math.sin(2 * math.pi * (time - phase) / period)
    )


PROCESSES: dict[str, Callable[..., Iterator[float]]] = {
    "poisson": poisson,
    "gamma": gamma,
    "markov-modulated": markov_modulated,
    "diurnal": diurnal,
    "fixed": fixed,
    "all-at-once": all_at_once,
}


def by_name(name: str, rng: Random, **options: Any) -> Iterator[float]:
    """A process of `PROCESSES` with its options."""
    if name not in PROCESSES:
        raise ConfigError(f"unknown arrival process {name!r}{nearest(name, PROCESSES)}")
    try:
        return PROCESSES[name](rng, **options)
    except TypeError as error:
        raise ConfigError(f"arrival process {name!r}: {error}") from None


def _summed(gap: Callable[[], float]) -> Iterator[float]:
    now = 0.0
    while True:
        now += gap()
        yield now


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} must be above 0 and finite, got {value}")
