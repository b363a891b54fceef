"""`kvarn sim`: a cluster in virtual time."""

from typing import Annotated, Any

import typer

from kvarn.bench.options import Fleet, Paid, Search, Traffic, Workload
from kvarn.cli_bench import serve_lines
from kvarn.cli_options import takes

#: completed share of the offered rate below which a load is called short (our choice)
SUSTAINED = 0.9

ToFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="write the result")]
Bounds = Annotated[bool, typer.Option("--bounds", help="print the distance to what is possible")]


def add_sim(app: typer.Typer) -> None:
    """Add `sim` to the program."""
    app.command("sim")(_sim)


@takes(fleet=Fleet, traffic=Traffic, work=Workload, search=Search, paid=Paid)
def _sim(
    fleet: dict[str, Any],
    traffic: dict[str, Any],
    work: dict[str, Any],
    search: dict[str, Any],
    paid: dict[str, Any],
    json: ToFile = None,
    bounds: Bounds = False,
) -> int:
    """Simulate a cluster of engines: the same scheduler, cache and router, priced steps."""
    from kvarn.bench import capacity, perfetto, plots, prices, record, sim
    from kvarn.bench.bounds import check, distances

    fleet_, work_, traffic_ = Fleet(**fleet), Workload(**work), Traffic(**traffic)
    if bounds:
        check(fleet_)
    wanted, money = Search(**search), prices.parse(Paid(**paid).price, fleet_)
    if traffic_.plots is not None:
        plots.ready(traffic_.plots)
    if money and wanted.find != "fleet":
        prices.per_hour(money, fleet_)  # a price that is missing is said before anything runs
    answer = None
    if search:
        answer = capacity.search(fleet_, work_, traffic_, wanted, money)
        fleet_, traffic_ = answer.fleet, answer.traffic
        done = sim.measured(fleet_, work_, traffic_, answer.trace)
        done.result["capacity"] = answer.report
    else:
        done = sim.run(fleet_, work_, traffic_)
    result = done.result
    if money:
        hour, each = prices.costs(money, fleet_, result["output_throughput"])
        result |= {"cost_per_hour": hour, "cost_per_million_output_tokens": each}
    if traffic_.perfetto is not None:
        perfetto.write(done.outcome, traffic_.perfetto)
    if traffic_.plots is not None:
        plots.write(done, traffic_.plots)
    if bounds:
        result["bounds"] = distances(fleet_, result, done.outcome, done.trace)
    record.write(result, json)
    lines = serve_lines(result, traffic_.percentiles) + sim_lines(result)
    if answer is not None:
        lines += capacity_lines(answer.report)
    print("\n".join(lines))
    return 0 if result["completed"] and (answer is None or answer.attained) else 1


def sim_lines(result: dict[str, Any]) -> list[str]:
    """What only a simulation knows."""
    lines = [
        f"prefix hits {result['prefix_hit_rate']:.1%}, {result['preemptions']} preemptions, "
        f"{result['energy_j'] / 1000:.1f} kJ, instances busy {result['utilisation']:.1%}",
        f"priced by {result['cost_model']}: {result['measured_share']:.1%} of the time lies inside "
        f"measured data",
        f"{result['pages']} KV pages of {result['page_size']} positions ({result['pages_source']})",
        f"{result['steps']} steps simulated in {result['wall_seconds']:.1f} s",
    ]
    if result.get("drafted_tokens"):
        lines.append(drafts_line(result))
    if skipped := result["workload"].get("skipped"):
        lines.append(f"{skipped} malformed rows of the trace were left out")
    if "cost_per_hour" in result:
        lines.append(f"costs {cost_of(result)}")
    if result["attainment"] is not None:
        lines.append(f"{result['attainment']:.2%} of all requests met every target")
    for name, row in result.get("bounds", {}).items():
        value, bound, ratio = row["value"], row["bound"], row["ratio"]
        lines.append(f"{name:22}{value:12.4g}, bound {bound:.4g} ({ratio:.3f} of it)")
    return lines


def drafts_line(result: dict[str, Any]) -> str:
    """What became of drafts, and of updates of the drafter."""
    said = (
        f"{result['drafted_tokens']} tokens drafted, {result['acceptance']:.1%} of them accepted, "
        f"in {result['verify_steps']} steps"
    )
    if result["training_s"]:
        said += (
            f"; {result['updates']} updates in force, {result['taken_back']} taken back, "
            f"{result['training_s']:.1f} s of learning, for which all waited "
            f"{result['paused_s']:.1f} s"
        )
    return said


def capacity_lines(report: dict[str, Any]) -> list[str]:
    """The answer of a capacity search, and its curve."""
    targets = ", ".join(f"{name} <= {most:g} ms" for name, most in report["targets_ms"].items())
    asked = f"{targets} for {report['attain']:.4g} of all requests"
    if report["find"] == "rate":
        return ["", *rate_lines(report, asked)]
    return ["", *fleet_lines(report, asked)]


def rate_lines(report: dict[str, Any], asked: str) -> list[str]:
    """The highest rate, the rates that it lies between, and every rate tried."""
    (low, high), unit, curve = report["bracket"], report["unit"], report["curve"]
    if low is None:
        found = f"no rate attains {asked}: not even {curve[0]['rate']:.4g} {unit}"
    elif high is None:
        found = (
            f"every rate attains {asked}, up to {low:.4g} {unit}: the load is too short to find a "
            f"limit; give more requests"
        )
    else:
        found = (
            f"highest rate with {asked}: {low:.4g} {unit} (not any more at {high:.4g}; "
            f"{report['simulations']} simulations)"
        )
    lines = [found, *curve_lines("rate", curve)]
    if low is not None and report["offered_per_s"] is not None:
        done = next(row["request_throughput"] for row in curve if row["rate"] == low)
        if done < SUSTAINED * report["offered_per_s"]:
            lines.append(
                f"a short load: {report['offered_per_s']:.4g} requests/s came, {done:.4g} were "
                f"completed; with more requests the highest rate will be lower"
            )
    return lines


def fleet_lines(report: dict[str, Any], asked: str) -> list[str]:
    """The cheapest fleet, and what was found of each kind of instance."""
    best = report["fleet"]
    if best is None:
        lines = [f"no fleet that was tried attains {asked}"]
    else:
        by = "price" if report["prices"] else "number of devices"
        lines = [
            f"cheapest fleet with {asked}: {best['instances']} x {best['device']} (tp={best['tp']})"
            f", by {by}, then energy; {report['simulations']} simulations"
        ]
    for one in report["candidates"]:
        found = one["reason"]
        if not found:
            found = f"{one['instances']} instances, {one['energy_j'] / 1000:.1f} kJ"
            found += f", {cost_of(one)}" if report["prices"] else ""
        lines.append(f"{one['device']}, tp={one['tp']}: {found}")
        if one["curve"]:
            lines += curve_lines("instances", one["curve"])
    return lines


def cost_of(row: dict[str, Any]) -> str:
    """What a fleet costs, in the unit of the prices."""
    each = row["cost_per_million_output_tokens"]
    tokens = "no output tokens" if each is None else f"{each:.4g} per million output tokens"
    return f"{row['cost_per_hour']:.4g} per hour, {tokens}"


def curve_lines(name: str, curve: list[dict[str, Any]]) -> list[str]:
    """A row for each simulation of a search."""
    lines = [
        f"{name:>10}{'attainment':>12}{'goodput/s':>12}{'requests/s':>12}{'TTFT ms':>12}{'p99':>12}"
        f"{'TPOT ms':>10}{'p99':>10}"
    ]
    for row in curve:
        lines.append(
            f"{row[name]:>10.4g}{row['attainment']:>12.2%}{row['request_goodput']:>12.3f}"
            f"{row['request_throughput']:>12.3f}{row['mean_ttft_ms']:>12.1f}"
            f"{row['p99_ttft_ms']:>12.1f}{row['mean_tpot_ms']:>10.2f}{row['p99_tpot_ms']:>10.2f}"
        )
    return lines
