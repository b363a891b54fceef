"""What a fleet can take and what a load needs: searches over simulations (`kvarn sim --find`).

A probe is one whole simulation. It attains if the asked share of all requests, refused and failed
ones included, meets every target. Both searches take attainment to be monotone (falling with the
rate, rising with the instances), which bursts and prefix caches can break: a search then finds one
of several limits, and cannot know of the others. A finite load ends at any rate, so a rate just
above what could be sustained shows only in a load that lasts long enough for queues to grow.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kvarn.bench import metrics, prices, probes
from kvarn.bench.checks import check_fleet, check_traffic
from kvarn.bench.options import Fleet, Search, Traffic, Workload
from kvarn.bench.prices import Prices
from kvarn.bench.probes import Probe
from kvarn.bench.sim_fleet import find_spec, page_size_of, pages_by_formula, price_list
from kvarn.bench.sim_load import find_trace, sessions_of
from kvarn.core.errors import ConfigError, nearest
from kvarn.core.model import ModelSpec
from kvarn.cost.devices import find_device
from kvarn.workload.trace import Trace
from kvarn.workload.transform import time_warp

KINDS = ("rate", "fleet")
FIRST_RATE = 1.0  #: where a data set's search starts if no finite rate was given [1/s]


@dataclass(slots=True)
class Candidate:
    """One kind of instance, and how many of them attain."""

    device: str
    tp: int
    instances: int | None = None  #: the fewest that attain; None: none that was tried
    devices: int | None = None  #: instances x tp
    energy_j: float | None = None  #: of the whole run on the fewest
    cost_per_hour: float | None = None  #: of the fewest; None without prices
    cost_per_million_output_tokens: float | None = None  #: the same
    reason: str = ""  #: why it cannot serve the load, where it cannot
    curve: list[Probe] = field(default_factory=list)  #: its probes, by number of instances


@dataclass(slots=True)
class Found:
    """The answer of a search, as what to simulate once more in full, and its report."""

    fleet: Fleet
    traffic: Traffic
    trace: Trace
    report: dict[str, Any]  #: result key `capacity`
    attained: bool


def search(
    fleet: Fleet, work: Workload, traffic: Traffic, wanted: Search, paid: Prices | None = None
) -> Found:
    """Answer `wanted.find`; the options are checked before anything is simulated."""
    check_fleet(fleet)
    check_traffic(traffic)
    check(traffic, wanted)
    if wanted.find == "rate":
        return rate_for(fleet, work, traffic, wanted)
    return fleet_for(fleet, work, traffic, wanted, paid)


def check(traffic: Traffic, wanted: Search) -> None:
    """Raise `ConfigError` for a question that has no answer."""
    if wanted.find is None:
        raise ConfigError("what is searched for? say --find rate or --find fleet")
    if wanted.find not in KINDS:
        raise ConfigError(f"cannot find {wanted.find!r}{nearest(wanted.find, KINDS)}")
    targets = metrics.parse_goodput(traffic.goodput)
    if not targets:
        raise ConfigError(
            f"--find {wanted.find} needs targets to attain, such as --goodput ttft:500 tpot:50"
        )
    if not 0 < wanted.attain <= 1:
        raise ConfigError(f"attain must be in (0, 1], got {wanted.attain:g}; 0.99 is 99 %")
    if not 0 < wanted.tolerance < 1:
        raise ConfigError(f"tolerance must be in (0, 1), got {wanted.tolerance:g}")
    if wanted.max_instances < 1:
        raise ConfigError(f"max instances must be at least 1, got {wanted.max_instances}")
    if wanted.find == "rate" and (wanted.try_device or wanted.try_tp):
        raise ConfigError("--try-device and --try-tp belong to --find fleet; for a rate give one")


# rate


def rate_for(fleet: Fleet, work: Workload, traffic: Traffic, wanted: Search) -> Found:
    """The highest rate at which the fleet attains."""
    start, unit, at_rate = scaled(work, traffic)

    def probe(rate: float) -> Probe:
        return probes.simulate(rate, fleet, work, *at_rate(rate), wanted.attain)

    found = probes.highest_rate(probe, start, wanted.tolerance, unit)
    shown = found.highest or found.curve[0]
    at, trace = at_rate(shown.at)
    report = _asked(traffic, wanted) | {
        "unit": unit,
        "tolerance": wanted.tolerance,
        "rate": found.highest and found.highest.at,
        "bracket": [found.highest and found.highest.at, found.lowest and found.lowest.at],
        "offered_per_s": None if at.closed_loop or not trace.span else len(trace) / trace.span,
        "simulations": len(found.curve),
        "curve": [one.row("rate") for one in found.curve],
    }
    return Found(fleet, at, trace, report, found.highest is not None)


def scaled(
    work: Workload, traffic: Traffic
) -> tuple[float, str, Callable[[float], tuple[Traffic, Trace]]]:
    """The first rate, its unit, and the load at any rate.

    A recorded trace runs faster or slower as a whole; a data set or a generator is made anew at the
    rate, in its own unit.
    """
    if traffic.trace is None or traffic.trace.startswith("synthetic-"):
        start = traffic.request_rate if math.isfinite(traffic.request_rate) else FIRST_RATE
        unit = "sessions/s" if sessions_of(traffic) else "requests/s"

        def made(rate: float) -> tuple[Traffic, Trace]:
            changed = replace(traffic, request_rate=rate)
            return changed, find_trace(work, changed)

        return start, unit, made
    recorded = find_trace(work, traffic)
    if not recorded.span:
        raise ConfigError(
            f"the {len(recorded)} requests of {recorded.name} arrive at one time: there is no rate "
            f"to scale; give a trace with arrival times, or a data set"
        )
    own = len(recorded) / recorded.span
    return own, "requests/s", lambda rate: (traffic, time_warp(recorded, rate / own))


# fleet


def fleet_for(
    fleet: Fleet, work: Workload, traffic: Traffic, wanted: Search, paid: Prices | None = None
) -> Found:
    """The cheapest fleet that attains; of equals, the one that takes less energy.

    Cheapest is what costs least where there are prices, else what has the fewest devices.
    """
    kinds = kinds_of(fleet, wanted)
    for kind in kinds if paid else ():
        prices.per_hour(paid or {}, kind)  # a price that is missing is said before anything runs
    spec, trace = find_spec(fleet.model), find_trace(work, traffic)
    if not len(trace):
        raise ConfigError(f"{trace.name} holds no request: any fleet would do")
    tried = [_candidate(kind, spec, work, traffic, trace, wanted, paid) for kind in kinds]
    by = ["cost_per_hour" if paid else "devices", "energy_j"]
    able = [(*(getattr(one, k) for k in by), i) for i, one in enumerate(tried) if one.instances]
    report = _asked(traffic, wanted) | {
        "cheapest_by": by,
        "prices": paid,
        "simulations": sum(len(one.curve) for one in tried),
        "fleet": None,
        "candidates": [_candidate_row(one) for one in tried],
    }
    if not able:
        held = [(kind, one) for kind, one in zip(kinds, tried) if one.curve]
        if not held:
            raise ConfigError(f"no fleet holds the model: {'; '.join(one.reason for one in tried)}")
        kind, one = held[0]
        most = replace(kind, instances=round(one.curve[-1].at))
        return Found(most, traffic, trace, report, False)
    best = min(able)[-1]
    count = tried[best].instances
    assert count is not None
    chosen = replace(kinds[best], instances=count)
    report["fleet"] = {"device": chosen.device, "tp": chosen.tp, "instances": count}
    return Found(chosen, traffic, trace, report, True)


def kinds_of(fleet: Fleet, wanted: Search) -> list[Fleet]:
    """A fleet of one instance for each device and tp to choose from."""
    names = " ".join(wanted.try_device).replace(",", " ").split() or [fleet.device]
    sizes = wanted.try_tp or (fleet.tp,)
    if fleet.cost == "roofline":
        for name in names:
            find_device(name)  # a misspelt name is an error, not a device that does not fit
    if fleet.pages and len(names) * len(sizes) > 1:
        raise ConfigError(
            "--pages was measured on one device and tp; leave it out to choose between several"
        )
    return [replace(fleet, device=name, tp=tp, instances=1) for name in names for tp in sizes]


def _candidate(
    kind: Fleet, spec: ModelSpec, work: Workload, traffic: Traffic, trace: Trace, wanted: Search,
    paid: Prices | None,
) -> Candidate:  # fmt: skip
    """The fewest instances of one kind."""
    reason = misfit(kind, spec, trace)
    if reason:
        return Candidate(kind.device, kind.tp, reason=reason)

    def probe(n: int) -> Probe:
        return probes.simulate(n, replace(kind, instances=n), work, traffic, trace, wanted.attain)

    most = min(wanted.max_instances, len(trace))
    best, curve = probes.fewest(probe, most)
    if best is None:
        share = curve[-1].found["attainment"]
        why = f"{most} instances attain for {share:.1%} of the requests"
        return Candidate(kind.device, kind.tp, reason=why, curve=curve)
    n = round(best.at)
    found = Candidate(kind.device, kind.tp, n, n * kind.tp, best.found["energy_j"], curve=curve)
    if paid:
        found.cost_per_hour, found.cost_per_million_output_tokens = prices.costs(
            paid, replace(kind, instances=n), best.found["output_throughput"]
        )
    return found


def misfit(kind: Fleet, spec: ModelSpec, trace: Trace) -> str:
    """Why an instance of this kind cannot exist; "" if it can."""
    try:
        price_list(kind, spec)
        if not kind.pages:
            pages_by_formula(kind, spec, page_size_of(kind, trace))
    except ConfigError as error:
        return str(error)
    return ""


def _asked(traffic: Traffic, wanted: Search) -> dict[str, Any]:
    return {
        "find": wanted.find,
        "targets_ms": metrics.parse_goodput(traffic.goodput),
        "attain": wanted.attain,
    }


def _candidate_row(one: Candidate) -> dict[str, Any]:
    return asdict(one) | {"curve": [probe.row("instances") for probe in one.curve]}
