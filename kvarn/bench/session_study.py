"""`kvarn reproduce deployment-challenges`: what long contexts cost sessions, simulated and in form.

Four parts: the published worked example beside the cost model; sessions an hour against users,
by formula, by a simulated queue and by this engine's control plane with its prefix cache; the link
speed at which swapping KV in beats computing it again; and every technique's effect on each channel
in simulation beside the one that the taxonomy states. All at the same peak prices.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from kvarn.bench import record
from kvarn.bench.session_engine import engine_rate
from kvarn.bench.sim_fleet import find_spec
from kvarn.cost.devices import find_device
from kvarn.cost.precision import Precision
from kvarn.cost.session import TECHNIQUES, Channel, SessionModel, Workload, session_model
from kvarn.sim.sessions import Back, Service, Totals, simulate

DEVICE = "a100-80g"
LOAD = Workload(context=50_000, answer=250, turns=5, think=30.0)
RESIDENT = (2, 4, 6)  #: users whose KV fits, in the experiments on the knee
ENGINE_AT = 4  #: of these, where the engine's control plane is simulated too
CONTEXTS = (4_000, 16_000, 50_000, 128_000)  #: of the crossover
FACTOR = 4.0  #: by which a technique divides what it acts on
SHARE = 0.01  #: of a channel's time below which it counts as unchanged

#: Yi-34B-200K in bf16 on an A100 of 80 GB, 20 GiB/s to the host, attention counted as L h S**2:
#: arXiv 2405.08944, section 2
YI = SessionModel(
    active=34e9, weights=68e9, read=68e9, layers=60, width=7168, kv_per_token=2 * 2 * 60 * 8 * 128,
    flops=312e12, bandwidth=2e12, memory=80e9, host=20 * 2**30, causal=1.0,
)  # fmt: skip
#: what the paper says at 4K and at 50K (read second-hand: rounded, and partly derived again)
PUBLISHED: dict[str, tuple[float, float]] = {
    "KV of a user [GB]": (1.0, 12.3),
    "users at once": (12.0, 1.0),
    "prefill [s]": (0.89, 14.1),
    "answer of 250 tokens [s]": (8.5, 9.8),
    "switch out and in [s]": (0.1, 1.1),
}
MEASURES: dict[str, Callable[[int], float]] = {
    "KV of a user [GB]": lambda s: YI.kv_bytes(s) / 1e9,
    "users at once": YI.concurrency,
    "prefill [s]": YI.prefill,
    "answer of 250 tokens [s]": lambda s: 250 * YI.decode(s),
    "switch out and in [s]": YI.switch,
}
Row = dict[str, Any]


def run(model: str) -> dict[str, Any]:
    """All parts, as a result; `model` is a shape by name."""
    device = find_device(DEVICE)
    full = session_model(find_spec(model), device, Precision())
    header = record.header("reproduce-sessions", asdict(LOAD), {"model": model, "device": DEVICE})
    return header | {
        "experiment": "deployment-challenges",
        "published": worked_example(),
        "fits": full.concurrency(LOAD.context),
        "knees": [row for fits in RESIDENT for row in knee(full, fits)],
        "crossover": [crossover(full, context) for context in CONTEXTS],
        "techniques": techniques(full),
    }


def worked_example() -> list[Row]:
    """The cost model beside the paper, at both contexts."""
    return [
        {"measure": name, "context": context, "published": said, "ours": MEASURES[name](context)}
        for name, both in PUBLISHED.items()
        for context, said in zip((4_000, 50_000), both, strict=True)
    ]


def with_room(model: SessionModel, users: int, load: Workload = LOAD) -> SessionModel:
    """The same with memory for so many users' KV, half a user to spare."""
    longest = load.context + load.turns * load.answer
    return replace(model, memory=model.weights + (users + 0.5) * model.kv_bytes(longest))


def as_recompute(model: SessionModel, load: Workload) -> SessionModel:
    """A host so slow that a switch takes as long as the prefill: the formulas of recomputation."""
    kv, prefill = model.kv_bytes(load.context), model.prefill(load.context)
    return replace(model, host=2 * kv / prefill)


def knee(full: SessionModel, fits: int) -> list[Row]:
    """Sessions an hour against users where `fits` of them are resident."""
    model = with_room(full, fits)
    rows = []
    for users in range(1, 2 * fits + 1):
        row: Row = {"fits": fits, "users": users}
        forms: dict[Back, SessionModel] = {"swap": model, "recompute": as_recompute(model, LOAD)}
        for back, priced in forms.items():
            found = simulate(model, LOAD, users, Service(fits, back))
            row[f"{back}_formula"] = priced.throughput(LOAD, users)
            row[f"{back}_simulated"] = found.per_hour
            row[f"{back}_missed"] = found.missed
        uneven = simulate(model, LOAD, users, Service(fits, "recompute", random_think=True))
        row["random_simulated"], row["random_missed"] = uneven.per_hour, uneven.missed
        if fits == ENGINE_AT:
            row |= engine_rate(model, LOAD, users, fits)
        rows.append(row)
    return rows


def crossover(full: SessionModel, context: int) -> Row:
    """The host bandwidth at which swapping serves as many sessions as recomputing [bytes/s]."""
    fits = 2
    load = replace(LOAD, context=context)
    model = with_room(full, fits, load)
    again = simulate(model, load, fits + 2, Service(fits, "recompute")).per_hour
    low, high = 1e8, 1e12
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        swapped = simulate(replace(model, host=middle), load, fits + 2, Service(fits)).per_hour
        low, high = (middle, high) if swapped < again else (low, middle)
    said = 2 * model.kv_bytes(context) / model.prefill(context)
    return {"context": context, "predicted": said, "simulated": high, "error": said / high - 1}


def techniques(full: SessionModel) -> list[Row]:
    """What each technique does to each channel in simulation, beside what the taxonomy says."""
    room = with_room(full, 4)
    base = _channels(room, _simulated(room))
    rows = []
    for name, technique in TECHNIQUES.items():
        model = room.with_technique(technique, FACTOR)
        found = _channels(model, _simulated(model))
        signs = {channel: _sign(base[channel], found[channel]) for channel in base}
        # more users resident is better, less time is better
        signs["concurrency"] = -signs["concurrency"]
        rows.append({"technique": name, "said": technique.signs(), "simulated": signs})
    return rows


def _simulated(model: SessionModel) -> Totals:
    fits = max(1, int(model.concurrency(LOAD.context + LOAD.turns * LOAD.answer)))
    return simulate(model, LOAD, 8, Service(fits))


def _channels(model: SessionModel, found: Totals) -> dict[Channel, float]:
    """Users resident, and device seconds of a session by channel."""
    each = {channel: seconds / found.sessions for channel, seconds in found.spent.items()}
    return {"concurrency": model.concurrency(LOAD.context), **each}


def _sign(before: float, after: float) -> int:
    """+1 if smaller, -1 if larger, 0 if about the same."""
    change = after - before
    return 0 if abs(change) <= SHARE * before else -1 if change > 0 else 1


def lines(result: dict[str, Any]) -> list[str]:
    """The parts as tables for people."""
    out = ["Yi-34B-200K on an A100 (published, and the cost model):"]
    for row in result["published"]:
        at = f"{row['measure']} at {row['context'] // 1000}K"
        out.append(f"  {at:34}{row['published']:>8.3g}{row['ours']:>10.3g}")
    said = result["workload"]
    out += [
        "",
        f"sessions/h of {result['config']['model']} on {result['config']['device']}: "
        f"{said['context']} tokens, {said['turns']} turns of {said['answer']}, "
        f"{said['think']:g} s thought; {result['fits']:.1f} users would fit",
        f"{'':14}{'KV swapped':>18}{'KV computed again':>30}",
        f"{'fit':>5}{'users':>7}{'formula':>10}{'queue':>10}{'missed':>8}{'formula':>10}"
        f"{'queue':>10}{'missed':>8}{'random':>10}{'missed':>8}{'engine':>10}{'missed':>8}",
    ]
    out += [*(_knee_line(row) for row in result["knees"]), _knees(result["knees"])]
    out += ["", "host link at which swapping equals recomputing [GB/s]:",
            f"{'context':>10}{'2K/T_pre':>12}{'simulated':>12}{'error':>10}"]  # fmt: skip
    out += [
        f"{row['context']:>10}{row['predicted'] / 1e9:>12.3f}{row['simulated'] / 1e9:>12.3f}"
        f"{row['error']:>10.1%}"
        for row in result["crossover"]
    ]
    names: tuple[Channel, ...] = ("concurrency", "prefill", "decode", "switch")
    out += ["", f"{'technique (stated / simulated)':46}" + "".join(f"{n:>13}" for n in names)]
    for row in result["techniques"]:
        pairs = (f"{row['said'][n]:+d} / {row['simulated'][n]:+d}" for n in names)
        out.append(f"{row['technique']:46}" + "".join(f"{pair:>13}" for pair in pairs))
    return out


def _knees(rows: list[Row]) -> str:
    """Where the curves bend: the most users of whom none has to come back."""
    last = {row["fits"]: row["users"] for row in rows if not row["recompute_missed"]}
    told = ", ".join(f"{users} where {fits} fit" for fits, users in last.items())
    return f"most users without a miss: {told}"


#: columns of the knees and their widths
_COLUMNS = {
    "fits": "5", "users": "7", "swap_formula": "10.1f", "swap_simulated": "10.1f",
    "swap_missed": "8.0%", "recompute_formula": "10.1f", "recompute_simulated": "10.1f",
    "recompute_missed": "8.0%", "random_simulated": "10.1f", "random_missed": "8.0%",
    "engine_simulated": "10.1f", "engine_missed": "8.0%",
}  # fmt: skip


def _knee_line(row: Row) -> str:
    return "".join(f"{row[key]:>{form}}" for key, form in _COLUMNS.items() if key in row)
