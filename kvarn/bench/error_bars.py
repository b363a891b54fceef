"""Error bars on "A beats B": the ratio of two policies when the time model is wrong.

Both policies are simulated under the same draws of wrong time models (`kvarn.cost.perturb`), as
wide as the model's errors against measurements. What is left of a ratio over the draws is [p5,
p95]; a policy is better only if p5 is above 1.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal, get_type_hints

from kvarn.bench import record, residuals, sim, sim_fleet
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.bench.sim_load import find_trace
from kvarn.bench.sim_report import workload_of
from kvarn.bench.stats import percentile
from kvarn.core.errors import ConfigError, nearest
from kvarn.cost.perturb import Perturbed, draws
from kvarn.cost.shape import CostModel
from kvarn.sim.heap import NS
from kvarn.sim.run import Outcome
from kvarn.workload.trace import Trace

#: what is compared, under the names of `bench serve`; True where more is better
MEASURES = {
    "mean_ttft_ms": False, "p99_ttft_ms": False, "mean_tpot_ms": False,
    "output_throughput": True, "prefix_hit_rate": True,
}  # fmt: skip

Verdict = Literal["better", "worse", "not decided", "no ratio"]
Measures = dict[str, float]
#: simulates a fleet priced by a cost model
Simulate = Callable[[Fleet, CostModel], Measures]
Watch = Callable[[int, int], None]


@dataclass(slots=True)
class Claim:
    """One measure of a policy against the baseline's: above 1, the policy is better."""

    measure: str
    policy: str
    baseline: str
    nominal: float | None  #: under the model as it is; None where one side alone is 0
    p5: float | None
    p95: float | None
    verdict: Verdict
    ratios: list[float | None]  #: by draw


@dataclass(slots=True)
class Draws:
    """Wrong time models that every policy meets."""

    n: int = 30
    seed: int = 0
    residuals: str | None = None  #: a validation's JSON; None: the device's published one


@dataclass(slots=True)
class Compared:
    """Policies under the same draws."""

    policies: list[str]  #: the first is the baseline
    nominal: list[Measures]  #: by policy
    drawn: list[list[Measures]]  #: by policy, by draw
    claims: list[Claim]


def gain(measure: str, policy: float, baseline: float) -> float | None:
    """How many times better the policy is; None where one side alone is 0."""
    if policy == baseline:
        return 1.0
    if policy == 0 or baseline == 0:
        return None
    return policy / baseline if MEASURES[measure] else baseline / policy


def judge(ratios: Sequence[float | None]) -> tuple[float | None, float | None, Verdict]:
    """[p5, p95] of the ratios, and what they decide."""
    if not ratios:
        raise ConfigError("a verdict needs at least one draw")
    known = sorted(ratio for ratio in ratios if ratio is not None)
    if len(known) < len(ratios):
        return None, None, "no ratio"
    low, high = percentile(known, 5), percentile(known, 95)
    return low, high, "better" if low > 1 else "worse" if high < 1 else "not decided"


def compare(
    fleets: Mapping[str, Fleet],
    price: Callable[[Fleet], CostModel],
    factors: Sequence[Mapping[str, float]],
    simulate: Simulate,
    watch: Watch = lambda done, total: None,
) -> Compared:
    """Simulate every fleet as it is priced and under every set of factors; the first is the base.

    `watch` is told after each simulation how many of how many are done.
    """
    names = list(fleets)
    if len(names) < 2:
        raise ConfigError("a comparison needs at least two policies")
    nominal, drawn = list[Measures](), list[list[Measures]]()
    each = 1 + len(factors)
    for i, fleet in enumerate(fleets.values()):
        cost, found = price(fleet), list[Measures]()
        for one in (cost, *(Perturbed(cost, wrong) for wrong in factors)):
            found.append(simulate(fleet, one))
            watch(i * each + len(found), len(fleets) * each)
        nominal.append(found[0])
        drawn.append(found[1:])
    claims = [
        _claim(measure, names[i], names[0], (nominal[i], nominal[0]), (drawn[i], drawn[0]))
        for i in range(1, len(names))
        for measure in MEASURES
    ]
    return Compared(names, nominal, drawn, claims)


def run(
    fleet: Fleet, work: Workload, traffic: Traffic, vary: str, how: Draws,
    watch: Watch = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Compare a fleet with itself under other values of one option (`varied`); the result."""
    fleets, width = varied(fleet, vary), residuals.read(how.residuals, fleet.device)
    trace = find_trace(work, traffic)
    found = compare(
        fleets,
        lambda one: sim_fleet.price_list(one, sim_fleet.find_spec(one.model)),
        draws(width.sigma, how.n, how.seed),
        simulator(trace, traffic.closed_loop),
        watch,
    )
    about = {"vary": vary, "draws": how.n, "draw_seed": how.seed}
    head = record.header("policies", workload_of(work, traffic, trace), asdict(fleet))
    return head | about | asdict(width) | asdict(found)


def _claim(
    measure: str, policy: str, baseline: str,
    nominal: tuple[Measures, Measures], drawn: tuple[list[Measures], list[Measures]],
) -> Claim:  # fmt: skip
    ratios = [
        gain(measure, ours[measure], theirs[measure]) for ours, theirs in zip(*drawn, strict=True)
    ]
    low, high, verdict = judge(ratios)
    at = gain(measure, nominal[0][measure], nominal[1][measure])
    return Claim(measure, policy, baseline, at, low, high, verdict, ratios)


def simulator(trace: Trace, closed_loop: bool = False) -> Simulate:
    """Simulations of one trace."""

    def run(fleet: Fleet, cost: CostModel) -> Measures:
        spec = sim_fleet.find_spec(fleet.model)
        return measures(sim.simulate(fleet, spec, trace, cost=cost, closed_loop=closed_loop))

    return run


def measures(outcome: Outcome) -> Measures:
    """`MEASURES` of a simulation; every request must have been served, or they mean nothing."""
    failed = sum(one.end is None for one in outcome.records)
    if failed or not outcome.records:
        raise ConfigError(
            f"{failed} of {len(outcome.records)} requests were not served, so that policies "
            f"cannot be compared; raise max_queue, max_len or the number of instances"
        )
    ttft, tpot, end = list[float](), list[float](), 0
    for one in outcome.records:
        assert one.end is not None and one.first is not None
        ttft.append((one.first - one.arrival) / NS * 1000)
        if one.n_out > 1:
            tpot.append((one.end - one.first) / NS * 1000 / (one.n_out - 1))
        end = max(end, one.end)
    return {
        "mean_ttft_ms": fmean(ttft),
        "p99_ttft_ms": percentile(sorted(ttft), 99),
        "mean_tpot_ms": fmean(tpot) if tpot else 0.0,
        "output_throughput": sum(one.n_out for one in outcome.records) * NS / end,
        "prefix_hit_rate": sum(one.cached for one in outcome.records)
        / sum(one.n_in for one in outcome.records),
    }


def varied(fleet: Fleet, said: str) -> dict[str, Fleet]:
    """Fleets by name out of `router=round_robin,least_loaded`; the first is the baseline."""
    name, equals, values = said.partition("=")
    hints = get_type_hints(Fleet)
    if not equals or not values:
        raise ConfigError(f"vary must be FIELD=VALUE,VALUE as in router=round_robin, not {said!r}")
    name = name.strip().replace("-", "_")
    if name not in hints:
        raise ConfigError(f"a fleet has no option {name!r}{nearest(name, hints)}")
    found = {}
    for value in (part.strip() for part in values.split(",")):
        found[f"{name}={value}"] = replace(fleet, **{name: _typed(name, value, hints[name])})
    if len(found) < 2:
        raise ConfigError(f"vary needs at least two different values of {name!r}, got {values!r}")
    return found


def _typed(name: str, value: str, hint: Any) -> Any:
    if hint is not int:
        return value
    try:
        return int(value)
    except ValueError:
        raise ConfigError(f"option {name!r} must be a whole number, not {value!r}") from None


def rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """A table of a result: measure, policy, value, ratio, bars and verdict as text, head first."""
    yield ["measure", "policy", "value", "ratio", "[p5, p95]", "verdict"]
    claims = {(one["measure"], one["policy"]): one for one in result["claims"]}
    for measure in MEASURES:
        for name, values in zip(result["policies"], result["nominal"], strict=True):
            value, claim = f"{values[measure]:.4g}", claims.get((measure, name))
            if claim is None:
                yield [measure, name, value, "", "", "baseline"]
            else:
                bars = f"[{shown(claim['p5'])}, {shown(claim['p95'])}]"
                yield [measure, name, value, shown(claim["nominal"]), bars, claim["verdict"]]


def shown(ratio: float | None) -> str:
    """A ratio with three decimals."""
    return "-" if ratio is None else f"{ratio:.3f}"
