"""`kvarn reproduce online-spec-sim`: a drafter that learns, in a cluster near what it can take.

Everything but acceptance is modelled: the control planes, length controls and trainer's rules are
the engine's, steps are priced by the roofline, an update takes what is stated. Acceptance over
updates is the curve fitted to `kvarn reproduce online-spec`, of SmolLM2's small drafter, and a pass
costs the share of a step of the model's that it reads of SmolLM2's parameters; that a drafter made
likewise for the model simulated here would learn alike is an assumption.

For each pair of targets the highest rate at which plain decoding attains them is searched for;
settings then meet the same requests at that rate and above it. The subject changes once,
in the middle, and every instance's drafter learns from its own requests.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvarn.bench import capacity, metrics, record
from kvarn.bench.options import Fleet, Search, Traffic, Workload
from kvarn.bench.sim import measured
from kvarn.bench.sim_drafts import measured_curve, slowdown
from kvarn.bench.sim_fleet import find_spec
from kvarn.bench.sim_load import find_trace
from kvarn.bench.sim_report import attainment, sample_of
from kvarn.models.json_file import read_json
from kvarn.sim.heap import NS

DRAFTER, TARGET = "smollm2-135m", "smollm2-135m"  #: where acceptance was measured
DEVICE = "H200"
SUBJECTS = "code,spanish"
LENGTH = 2  #: of the drafts of all settings that learn, as where acceptance was measured [tokens]
LENGTHS = (1, 2, 3, 4)  #: of drafters that do not
INTERVALS = (2, 8, 32, 128, 512)  #: requests of an instance from update to update
SOME = 32  #: the interval where only one is simulated
PAUSES = (0.02, 0.1, 0.5)  #: that an update takes, with all steps waiting for it [s]
THREAD = 0.5  #: that it takes in a thread [s]
#: (TTFT, TPOT) [ms]: small batches, and large ones
TARGETS = ((500.0, 5.3), (500.0, 12.0))
ATTAIN = 0.9  #: share of the requests that makes a rate sustained
LOADS = (1.0, 1.3)  #: times the highest rate of plain decoding
WORK = Workload(num_prompts=2000, input_len=256, output_len=96, range_ratio=0.5)
KEPT = (
    "request_goodput", "attainment", "request_throughput", "mean_ttft_ms", "p99_ttft_ms",
    "mean_tpot_ms", "p99_tpot_ms", "acceptance", "updates", "taken_back", "training_s", "paused_s",
)  # fmt: skip


@dataclass(slots=True, frozen=True)
class Setting:
    """What is compared, and how the fleet's options say it."""

    name: str
    options: dict[str, Any]
    interval: int | None = None  #: requests; None: it does not learn
    seconds: float | None = None  #: of an update


def drafter_share() -> float:
    """Of the parameters that a step of SmolLM2 reads, those that a pass of its drafter reads."""
    folder = files("kvarn").joinpath("speculate", "drafters", DRAFTER)
    spec, target = find_spec(str(folder)), find_spec(TARGET)
    written = int(read_json(Path(str(folder)) / "config.json")["trained"]["vocabulary"])
    return (spec.n_params() - (spec.vocab - written) * spec.hidden) / target.n_params()


def settings() -> list[Setting]:
    """All of them."""
    drafts = {"speculate": "draft", "draft_cost": drafter_share(), "acceptance": "measured"}
    fixed = drafts | {"draft_length": "fixed"}
    ours = fixed | {"draft_tokens": LENGTH}
    found = [Setting("plain", {})]
    found += [Setting(f"frozen, {k} tokens", fixed | {"draft_tokens": k}) for k in LENGTHS]
    found.append(Setting("frozen, survival", drafts | {"draft_tokens": LENGTHS[-1]}))
    found += [_learns("inline", i, pause, ours) for pause in PAUSES for i in INTERVALS]
    found += [_learns("on", i, THREAD, ours) for i in INTERVALS]
    found.append(_learns("idle", SOME, THREAD, ours))
    adaptive = drafts | {"draft_tokens": LENGTH}
    found.append(replace(_learns("inline", SOME, PAUSES[0], adaptive), name="inline, survival"))
    return found


def _learns(mode: str, interval: int, seconds: float, options: dict[str, Any]) -> Setting:
    said = {"train_drafter": mode, "train_interval": interval, "train_seconds": seconds}
    return Setting(mode, options | said, interval, seconds)


def some() -> list[Setting]:
    """Those that tell whether drafts pay at all."""
    cheap = (None, SOME, PAUSES[0])
    return [one for one in settings() if one.interval in cheap and one.seconds in cheap]


def run(model: str) -> dict[str, Any]:
    """All settings at the first targets, some at the others."""
    fleet = Fleet(model=model, device=DEVICE, instances=2, router="least_loaded")
    curve = measured_curve()
    workload = asdict(WORK) | {
        "subjects": SUBJECTS, "loads": LOADS, "attain": ATTAIN, "targets": TARGETS,
    }  # fmt: skip
    config = asdict(fleet) | {
        "draft_cost": drafter_share(), "thread_s": THREAD, "slowdown": slowdown(),
    }  # fmt: skip
    header = record.header("online_spec_sim", workload, config)
    rows, rates = [], dict[str, float]()
    for number, (ttft, tpot) in enumerate(TARGETS):
        traffic = Traffic(goodput=(f"ttft:{ttft:g}", f"tpot:{tpot:g}"))
        rates[f"{tpot:g}"] = rate = rate_of(fleet, traffic)
        print(f"TPOT {tpot:g} ms: plain decoding sustains {rate:.1f} requests/s", flush=True)
        for load in LOADS:
            chosen = some() if number else settings()
            rows += list(_compared(fleet, replace(traffic, request_rate=load * rate), chosen, load))
    return header | {
        "experiment": "online-spec-sim",
        "curve": asdict(curve),
        "rates": rates,
        "results": rows,
    }


def rate_of(fleet: Fleet, traffic: Traffic) -> float:
    """The highest rate at which plain decoding attains the targets [requests/s]."""
    wanted = Search("rate", attain=ATTAIN, tolerance=0.03)
    found = capacity.search(fleet, WORK, traffic, wanted).report["rate"]
    assert isinstance(found, float), "no rate is sustained"
    return found


def _compared(
    fleet: Fleet, traffic: Traffic, chosen: list[Setting], load: float
) -> Iterator[dict[str, Any]]:
    """A row for each setting: the same requests at the same times."""
    trace = find_trace(WORK, traffic)
    half, targets = trace.span / 2, metrics.parse_goodput(traffic.goodput)
    turns = {"subjects": SUBJECTS, "subject_seconds": half}
    for one in chosen:
        changed = replace(fleet, **(one.options | turns if one.options else {}))
        done = measured(changed, WORK, traffic, trace)
        row = {
            "tpot_target": targets["tpot"], "load": load, "rate": traffic.request_rate,
            "setting": one.name, "interval": one.interval, "seconds": one.seconds,
        } | {name: done.result.get(name) for name in KEPT}  # fmt: skip
        for at, subject in enumerate(SUBJECTS.split(",")):
            some = [sample_of(r) for r in done.outcome.records if (r.arrival > half * NS) == at]
            row[f"attainment_{subject}"] = attainment(some, len(some), targets)
        print(f"{one.name} {one.interval} {one.seconds}: {row['request_goodput']:.2f}", flush=True)
        yield row


def grid(result: dict[str, Any], key: str, load: float) -> list[list[Any]]:
    """At the first targets: a row for each way to learn, a value of `key` for each interval."""
    tpot = result["workload"]["targets"][0][1]
    rows = [r for r in result["results"] if r["tpot_target"] == tpot and r["load"] == load]
    found = {(r["setting"], r["seconds"], r["interval"]): r[key] for r in rows}
    ways = [("inline", pause) for pause in PAUSES] + [("on", THREAD)]
    names = {"inline": "between steps", "on": "in a thread"}
    return [
        [f"{names[mode]}, {seconds:g} s", *(found[mode, seconds, i] for i in INTERVALS)]
        for mode, seconds in ways
    ]


def others(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that are not in `grid`."""
    tpot = result["workload"]["targets"][0][1]
    return [
        row
        for row in result["results"]
        if row["tpot_target"] != tpot or row["setting"] not in ("inline", "on")
    ]


def lines(result: dict[str, Any]) -> list[str]:
    """Tables for people."""
    out = []
    for load in result["workload"]["loads"]:
        out.append(
            f"goodput at {load:g} of plain decoding's highest rate, by interval: {INTERVALS}"
        )
        for name, *values in grid(result, "request_goodput", load):
            out.append(f"{name:24}" + "".join(f"{value:>9.2f}" for value in values))
    out.append("TPOT target, load, setting: goodput, attainment, mean TPOT [ms], acceptance")
    for row in others(result):
        share = "" if row["acceptance"] is None else f"{row['acceptance']:>8.3f}"
        out.append(
            f"{row['tpot_target']:>5g} {row['load']:>5g}  {row['setting']:20} "
            f"{row['seconds'] or '':>5} {row['request_goodput']:>8.2f} {row['attainment']:>8.1%} "
            f"{row['mean_tpot_ms']:>8.2f}{share}"
        )
    return out
