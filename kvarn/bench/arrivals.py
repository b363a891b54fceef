"""When requests are sent: Poisson, gamma and fixed intervals, or all at once."""

import math
from random import Random

from kvarn.core.errors import ConfigError


def arrival_times(n: int, rate: float, burstiness: float, rng: Random) -> list[float]:
    """Seconds after the start at which each of `n` requests is due.

    `rate` is in requests per second; infinity sends all at once. Intervals follow a gamma
    distribution of shape `burstiness`: 1 is a Poisson process, smaller is burstier, infinity is a
    fixed interval. As in `vllm bench serve`, the times are scaled so that the last request is due
    at n / rate: seeds then differ in pattern, not in load.
    """
    if not rate > 0:
        raise ConfigError(f"request rate must be above 0, got {rate}")
    if not burstiness > 0:
        raise ConfigError(f"burstiness must be above 0, got {burstiness}")
    if n == 0 or math.isinf(rate):
        return [0.0] * n
    if math.isinf(burstiness):
        return [(i + 1) / rate for i in range(n)]
    times, now = [], 0.0
    for _ in range(n):
        now += rng.gammavariate(burstiness, 1.0)
        times.append(now)
    scale = n / rate / now
    return [time * scale for time in times]
