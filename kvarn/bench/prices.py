"""What a fleet costs, by prices of devices that the user gives; none are built in.

Money is in the user's own unit. A fleet is paid for from the first arrival to the last answer, busy
or not, so that what a token costs falls with the load.
"""

import math
from collections.abc import Sequence

from kvarn.bench.options import Fleet
from kvarn.core.errors import ConfigError
from kvarn.cost.devices import find_device

Prices = dict[str, float]  #: of one device for an hour, by its name in lower case


def parse(given: Sequence[str], fleet: Fleet) -> Prices:
    """`h100=2.5,t4=0.35` as prices. ConfigError for what is no price or no device."""
    found: Prices = {}
    for word in " ".join(given).replace(",", " ").split():
        name, _, number = word.partition("=")
        try:
            price = float(number)
        except ValueError:
            price = math.nan
        if not name or not 0 < price < math.inf:
            raise ConfigError(
                f"--price takes the price of one device for an hour, as in h100=2.5, not {word!r}"
            )
        if fleet.cost == "roofline":
            find_device(name)  # a misspelt name is an error
        if name.lower() in found:
            raise ConfigError(f"--price names {name} twice")
        found[name.lower()] = price
    return found


def per_hour(prices: Prices, fleet: Fleet) -> float:
    """Of all devices of a fleet, for an hour. ConfigError where its price is missing."""
    price = prices.get(fleet.device.lower())
    if price is None:
        raise ConfigError(
            f"no price of {fleet.device} was given ({', '.join(prices)}); "
            f"add --price {fleet.device.lower()}=..., what one costs for an hour"
        )
    return price * fleet.instances * fleet.tp


def costs(prices: Prices, fleet: Fleet, tokens_per_second: float) -> tuple[float, float | None]:
    """Of an hour and of a million output tokens; None where a run made no tokens."""
    hour = per_hour(prices, fleet)
    return hour, hour / 3600 / tokens_per_second * 1e6 if tokens_per_second else None
