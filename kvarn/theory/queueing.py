"""Mean values of single-server queues with Poisson arrivals; the simulator is checked on them.

`rate` in requests per second, times in seconds. Each raises `ConfigError` at utilisation 1 or
more, where there is no steady state. Formulas: Kleinrock, Queueing Systems I (1975), section 5.6,
and II (1976), section 4.4.
"""

from kvarn.core.errors import ConfigError


def utilisation(rate: float, service: float) -> float:
    """Share of time that the server is busy; refuses what has no steady state."""
    if rate < 0 or service < 0:
        raise ConfigError(f"rate {rate} and service {service} must not be negative")
    load = rate * service
    if load >= 1:
        raise ConfigError(f"utilisation {load:.3g} has no steady state; rate x service below 1 has")
    return load


def mg1_wait(rate: float, mean: float, second_moment: float) -> float:
    """Mean time in queue, first come first served: rate E[S^2] / (2 (1 - load)) [s].

    Pollaczek and Khinchine; `second_moment` is E[S^2] in s^2.
    """
    if second_moment < mean * mean * (1 - 1e-12):
        raise ConfigError(f"E[S^2] {second_moment} is below E[S]^2 {mean * mean}")
    return rate * second_moment / (2 * (1 - utilisation(rate, mean)))


def md1_wait(rate: float, service: float) -> float:
    """Mean time in queue when every request takes `service` seconds [s]."""
    return mg1_wait(rate, service, service * service)


def mm1_wait(rate: float, mean: float) -> float:
    """Mean time in queue with exponential service [s]."""
    return mg1_wait(rate, mean, 2 * mean * mean)


def sharing_sojourn(rate: float, mean: float, own: float | None = None) -> float:
    """Mean time in a processor-sharing server: own / (1 - load), whatever the distribution [s].

    `own` is the work of the request asked for (default: the mean over all).
    """
    return (mean if own is None else own) / (1 - utilisation(rate, mean))


def little(rate: float, sojourn: float) -> float:
    """Mean number of requests inside, for any stable system: rate x mean time inside."""
    return rate * sojourn
