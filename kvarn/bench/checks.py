"""Numbers that mean nothing are refused before anything runs."""

from collections.abc import Sequence

from kvarn.bench.options import Fleet, Traffic
from kvarn.bench.sim_drafts import check_drafts
from kvarn.core.errors import ConfigError

#: least value of the whole numbers of a fleet
LEAST = {
    "instances": 1, "tp": 1, "max_seqs": 1, "budget": 1, "max_queue": 0, "max_len": 0,
    "page_size": 0, "pages": 0, "round_context": 0,
}  # fmt: skip


def check_fleet(fleet: Fleet) -> None:
    """Raise `ConfigError` for a fleet that cannot be."""
    for name, least in LEAST.items():
        value = getattr(fleet, name)
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    check_drafts(fleet)


def check_traffic(traffic: Traffic) -> None:
    """Raise `ConfigError` for traffic that cannot be, or cannot be reported."""
    check_percentiles(traffic.percentiles)
    if traffic.limit < 0:
        raise ConfigError(f"limit must be at least 0 (all of the trace), got {traffic.limit}")


def check_percentiles(wanted: Sequence[float]) -> None:
    """Raise `ConfigError` for what is no percentage."""
    for share in wanted:
        if not 0 <= share <= 100:
            raise ConfigError(f"a percentile must be in [0, 100], got {share}")
