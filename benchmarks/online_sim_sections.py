"""Sections of docs/results.md on drafts in simulation."""

from statistics import median
from typing import Any

from cells import Lines, cell, table

from kvarn.bench import online_sim as online
from kvarn.sim.learner import MOST

WHY = """*Measured are acceptance, the wait for the host between steps that verify (less what a
draft takes, where none looks at it), and what learning in a thread costs; all else is modelled.*
Goodput is the requests a second that met both targets; *between steps* all steps of an instance
wait for an update, *in a thread* they take {slow} times as long (as measured on an H200) and
updates take a quarter of the time at most. Every instance's drafter learns from its own requests,
from the last {most} of an interval."""


def online_spec_sim(result: dict[str, Any]) -> Lines:
    """Goodput by the interval between updates and by what they take."""
    said, config, curve = result["workload"], result["config"], result["curve"]
    ttft, tpot = said["targets"][0]
    lines = [
        f"`kvarn reproduce {result['experiment']}`: {config['instances']} instances of "
        f"{config['model']} on {config['device']} behind `{config['router']}`, priced by the "
        f"roofline; {said['num_prompts']} requests of about {said['input_len']} tokens and "
        f"{said['output_len']} of answer; the first half of the time code, then Spanish. A pass "
        f"of the drafter costs {cell(config['draft_cost'])} of a step. "
        + WHY.format(slow=cell(config["slowdown"]), most=MOST).replace("\n", " "),
        "",
        f"The curve, fitted to [the measured quarters](#a-drafter-that-learns) (an update of "
        f"{cell(curve['lessons'])} requests; a subject is known to 1 - 1/e after "
        f"{cell(curve['tau'])} updates; {cell(curve['error'])} off, root mean square): share "
        "of first and second drafted tokens that stand.",
        "",
        *table(["subject", *_places("frozen"), *_places("after others"), *_places("learnt")],
               [_shares(name, curve["subjects"][name]) for name in said["subjects"].split(",")]),
    ]  # fmt: skip
    for load in said["loads"]:
        rate = load * result["rates"][f"{tpot:g}"]
        lines += ["", *_at(result, load, f"{rate:.1f} requests/s", ttft, tpot)]
    lines += [
        "",
        "Beside them, there and where larger batches are allowed (rates over the highest that "
        "plain decoding sustains):",
        "",
        *_others(result),
    ]
    return lines


def _places(what: str) -> list[str]:
    return [f"{what}: 1st", "2nd"]


def _shares(name: str, subject: dict[str, Any]) -> list[Any]:
    base = subject["base"]
    rows = [
        base[:2],
        *([b + more for b, more in zip(base, subject[key])] for key in ("start", "end")),
    ]
    return [name, *(share for row in rows for share in row)]


def _at(result: dict[str, Any], load: float, rate: str, ttft: float, tpot: float) -> Lines:
    """Goodput by interval."""
    best = {
        key: max(
            (row for row in online.others(result)
             if (row["tpot_target"], row["load"]) == (tpot, load) and row["setting"].startswith(key)
             and "survival" not in row["setting"]),
            key=lambda row: float(row["request_goodput"]),
        )
        for key in ("plain", "frozen")
    }  # fmt: skip
    never = next(
        row for row in result["results"]
        if (row["tpot_target"], row["load"]) == (tpot, load)
        and row["setting"] == f"frozen, {online.LENGTH} tokens"
    )  # fmt: skip
    names = [f"{i}" for i in online.INTERVALS]
    rows = [
        [*row, never["request_goodput"]] for row in online.grid(result, "request_goodput", load)
    ]
    return [
        f"Requests/s within {ttft:g} ms TTFT and {tpot:g} ms TPOT at {rate} ({load:g} times what "
        f"plain decoding sustains), by requests from update to update: plain decoding "
        f"**{cell(best['plain']['request_goodput'])}**, best fixed length without learning "
        f"**{cell(best['frozen']['request_goodput'])}** ({best['frozen']['setting'][8:]}).",
        "",
        *table([f"{online.LENGTH} tokens, learns", *names, "never"], rows),
    ]


def _others(result: dict[str, Any]) -> Lines:
    first, subjects = result["workload"]["targets"][0][1], result["workload"]["subjects"].split(",")
    rows = [
        [
            f"{row['tpot_target']:g}", f"{row['load']:g}", _name(row), row["request_goodput"],
            *(row[f"attainment_{name}"] for name in subjects), row["mean_tpot_ms"],
            row["p99_tpot_ms"], row["acceptance"], row["updates"], row["paused_s"],
        ]
        for row in result["results"]
        if row["tpot_target"] != first or row["setting"] not in ("inline", "on")
        or row["interval"] == online.SOME
    ]  # fmt: skip
    names = ["TPOT target ms", "rate", "setting", "goodput", *(f"met, {name}" for name in subjects)]
    names += ["TPOT ms", "p99", "drafts accepted", "updates", "paused s"]
    return table(names, rows)


def _name(row: dict[str, Any]) -> str:
    if row["interval"] is None:
        return str(row["setting"])
    return f"learns {row['setting']}, every {row['interval']}, {row['seconds']:g} s"


def sim_drafts(result: dict[str, Any]) -> Lines:
    """Simulated gains of drafts beside measured ones."""
    rows = result["results"]
    batches = sorted({row["batch"] for row in rows})
    found = {
        (row["file"], row["tokens"], row["acceptance"], row["batch"]): row for row in rows
    }  # fmt: skip
    kinds = list(dict.fromkeys(key[:3] for key in found))
    shown = [
        [
            "free" if file == kinds[0][0] else "a layer of the model", tokens, f"{share:g}",
            *(_pair(found.get((file, tokens, share, batch))) for batch in batches),
        ]
        for file, tokens, share in kinds
    ]  # fmt: skip
    over = sorted(row["over"] for row in rows)
    small = [row["over"] for row in rows if row["batch"] <= 64]
    return [
        f"`benchmarks/validate_drafts.py`: rate over plain decoding with drafts of fixed lengths, "
        f"{result['config']['model']}, measured on an {result['config']['device']} with random "
        "weights / simulated with the roofline, by requests that come together. Of this GPU's "
        "times only the wait for the host between steps that verify is known. Simulated over "
        f"measured: {cell(over[0])} to {cell(over[-1])}, in the median {cell(median(over))}, at up "
        f"to 64 requests {cell(median(small))}.",
        "",
        *table(["drafter", "tokens", "stand", *map(str, batches)], shown),
    ]


def _pair(row: dict[str, Any] | None) -> str | None:
    return None if row is None else f"{cell(row['measured'])} / {cell(row['simulated'])}"
