"""The section of docs/results.md on training beside serving."""

from typing import Any

from cells import Lines, cell, ratio, table

KINDS = {
    "all": "all",
    "beside": "B's thread computed meanwhile",
    "apart": "it did not",
}
WHEN = {"on": "beside the steps", "idle": "only while no request runs"}


def train_beside(result: dict[str, Any]) -> Lines:
    """What learning costs those who are served meanwhile, and whether it gives way."""
    said, config = result["workload"], result["config"]
    when = WHEN[said.get("learns", "on")]
    lines = [
        f"{config['model']} and its drafter ({config['draft_tokens']} tokens a round), twice in "
        f"one process: A's does not learn, B's learns in a thread, {when}. In turns they serve the "
        f"same requests at the same times, {result['rate']:.2f} a second, {said['output']} tokens "
        f"an answer, {config['max_seqs']} at once. Requests of at least {said['least']} tokens "
        "count, where nothing was captured meanwhile on either side. By turn: p95 of the time per "
        "output token, share of the time with work, share of the time in which B's thread "
        "computed, and share of that which went on beside steps:",
        "",
        *_by_turn(result),
        "",
        f"Between turns of one subject A's own p95 differs by {_spreads(result)}. All turns "
        "together, with the interval that holds 90 % of the bootstrap's ratios; and steps that "
        "only decode, over A's of as many sequences:",
        "",
        *_together(result),
        "",
        *_yielding(result["yielding"], result["steps"]["all"]),
    ]
    failed = result["trainer"]["failed"]
    return [*lines, "", f"**The training ended with an error: {failed}**"] if failed else lines


def _by_turn(result: dict[str, Any]) -> Lines:
    """A row for each pair of turns."""
    names = ["turn", "subject", "requests", "A p95 [ms]", "B p95 [ms]", "B / A", "A busy", "B busy"]
    names += ["A accepted", "B accepted", "versions", "taken back", "computed", "beside steps"]
    rows = []
    for a, b in zip(result["results"][::2], result["results"][1::2], strict=True):
        pairs = result["by_turn"].get(str(a["turn"]), {"requests": 0})
        rows.append(
            [
                a["turn"] + 1, a["phase"], pairs["requests"], pairs.get("a_p95_ms"),
                pairs.get("b_p95_ms"), ratio(pairs.get("ratio_p95")), a["busy"], b["busy"],
                a["accepted"], b["accepted"], b["published"], b["rolled_back"], b["computing"],
                b["in_steps"],
            ]
        )  # fmt: skip
    return table(names, rows)


def _spreads(result: dict[str, Any]) -> str:
    """Of A, by subject."""
    spreads = result["spread_of_a"].items()
    known = [f"{cell(100 * by)} % ({phase})" for phase, by in spreads if by is not None]
    return " and ".join(known) or "an amount that one turn does not tell"


def _together(result: dict[str, Any]) -> Lines:
    """Requests and steps, by whether the thread computed meanwhile."""
    names = ["B's", "requests", "A p50 [ms]", "B p50 [ms]", "B / A", "A p95 [ms]", "B p95 [ms]"]
    names += ["B / A ", "interval", "steps", "B / A, mean", "B / A, median"]
    rows = []
    for kind, name in KINDS.items():
        asked, steps = result["requests"][kind], result["steps"][kind]
        low, high = asked.get("interval_p95", (None, None))
        rows.append(
            [
                name, asked["requests"], asked.get("a_p50_ms"), asked.get("b_p50_ms"),
                ratio(asked.get("ratio_p50")), asked.get("a_p95_ms"), asked.get("b_p95_ms"),
                ratio(asked.get("ratio_p95")), f"{ratio(low)} to {ratio(high)}",
                steps["alike_steps"], ratio(steps["alike_mean"]), ratio(steps["alike_median"]),
            ]
        )  # fmt: skip
    return table(names, rows)


def _yielding(found: dict[str, Any], steps: dict[str, Any]) -> Lines:
    """How long the thread computes without asking, beside a step."""
    lesson, went_on, waited = (found[f"{name}_ms"] for name in ("lesson", "went_on", "waited"))
    if not lesson["count"]:
        return ["B's thread had too few lessons for an update."]
    lines = [
        f"B's thread asks before each lesson whether to go on. One took {_of(lesson)}, the "
        f"making of a version {_of(found['version_ms'])}, putting one in force between two steps "
        f"{_of(found['renewal_ms'])}; a step of A that only decodes {cell(steps['a_p50_ms'])} ms."
    ]
    if not waited["count"]:
        return [*lines, "No load came while it had a job."]
    most = max(int(pieces) for pieces in found["pieces_after"])
    return [
        *lines,
        f"Requests came {waited['count']} times while it had a job, and waited for {_of(waited)} "
        f"to be let in. Lessons that ran while they waited: at most {most}, for {_of(went_on)} "
        f"more; in {found['gave_way']} of the cases it was at rest before they were let in.",
    ]


def _of(found: dict[str, Any]) -> str:
    """A median and a maximum."""
    if not found["count"]:
        return "no time at all (never)"
    return f"{cell(found['median'])} ms (at most {cell(found['max'])})"
