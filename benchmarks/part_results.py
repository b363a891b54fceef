"""What `kvarn parts` shows as each part's result, out of benchmarks/results.

`table.py` writes it into the package, since an installed kvarn has no benchmarks/. No number is
typed in by hand.
"""

import json
from statistics import mean
from typing import Any

from cells import ROOT, cell

SHARE = 0.25  #: sparsity is judged where at most this much of the KV is kept or read
FILE = ROOT / "kvarn" / "bench" / "part_results.json"

Results = dict[str, dict[str, Any]]  #: by file name
Row = dict[str, Any]


def part_results(results: Results) -> list[Row]:
    """One row for each part that was measured: kind, name, result in words, and its file."""
    found = {(row["kind"], row["name"]): row for row in modelled(results)}
    for row in [*speculated(results), *kept(results), *selected(results), *filtered(results)]:
        found[row["kind"], row["name"]] = row
    return [found[key] for key in sorted(found)]


def write(results: Results) -> None:
    """Write it into the package."""
    FILE.write_text(json.dumps(part_results(results), indent=1) + "\n")


def _rows(results: Results, bench: str) -> list[tuple[str, dict[str, Any], Row]]:
    """File name, result and row of all results of a bench."""
    return [
        (name, result, row)
        for name, result in results.items()
        if result["bench"] == bench
        for row in result["results"]
    ]


def _ratios(kind: str, name: str, all_: list[tuple[float, str, str]], over: str) -> Row:
    """The range of ratios, and where the best was; of (ratio, case, file)."""
    best, worst = max(all_), min(all_)
    text = f"{cell(worst[0])} to {cell(best[0])} times {over}; the best: {best[1]}"
    return {"kind": kind, "name": name, "result": text, "file": best[2]}


def speculated(results: Results) -> list[Row]:
    """Proposers and length controls with a real model: output rates over plain decoding."""
    found: dict[tuple[str, str], list[tuple[float, str, str]]] = {}
    for file, result, row in _rows(results, "reproduce"):
        proposer, comma, length = row["setting"].partition(", ")
        if not comma:
            continue
        case = f"{row['setting']} on {row['text']}, batch {row['batch']}"
        where = f"{case}; {result['config']['model']} on {result['device']['cpu']}"
        for key in (("proposer", proposer), ("draft-length", length.split(" ")[0])):
            found.setdefault(key, []).append((row["ratio"], where, file))
    return [_ratios(*key, all_, "plain decoding") for key, all_ in found.items()]


def modelled(results: Results) -> list[Row]:
    """Length controls on modelled machines, for those that no real model was run with."""
    found: dict[str, list[tuple[float, str, str]]] = {}
    for file, _, row in _rows(results, "reproduce-lengths"):
        case = f"{row['machine']}, {row['text']}"
        found.setdefault(row["setting"].split(" ")[0], []).append((row["ratio"], case, file))
    over = "no drafts on modelled machines"
    return [_ratios("draft-length", name, all_, over) for name, all_ in found.items()]


def kept(results: Results) -> list[Row]:
    """Parts that keep some of the KV."""
    rows = _rows(results, "reproduce-kept")
    full = {file: row["stored_bytes"] for file, _, row in rows if row["sparsity"] == "none"}
    shares = [row["stored_bytes"] / full[file] for file, _, row in rows]
    return _least(rows, shares, "kept")


def selected(results: Results) -> list[Row]:
    """Parts that only choose what is read; those that drop the rest have a row of their own."""
    dropped = {row["name"] for row in kept(results)}
    rows = [one for one in _rows(results, "reproduce-selection") if _name(one[2]) not in dropped]
    shares = [row["read"] / result["workload"]["prompt"] for _, result, row in rows]
    return _least(rows, shares, "read a step")


def filtered(results: Results) -> list[Row]:
    """Parts that choose what of a prompt goes on: needles found, over those of the whole prompt."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for file, result, row in _rows(results, "reproduce-filter"):
        if row["set"].startswith("needle"):
            mine = (row[result["experiment"]], row["full"], file)
            found.setdefault(result["experiment"], []).append(mine)
    return [
        {
            "kind": "sparsity", "name": name, "file": all_[0][2],
            "result": f"needle found in {cell(mean(x for x, _, _ in all_))} of the questions, with "
            f"the whole prompt in {cell(mean(x for _, x, _ in all_))}",
        }
        for name, all_ in found.items()
    ]  # fmt: skip


def _name(row: Row) -> str:
    name: str = row["sparsity"].partition(":")[0]
    return name


def _least(
    rows: list[tuple[str, dict[str, Any], Row]], shares: list[float], what: str
) -> list[Row]:
    """The row of each part with the least KL divergence from the full cache, within SHARE."""
    best: dict[str, tuple[float, str, str]] = {}
    for (file, result, row), share in zip(rows, shares, strict=True):
        if _name(row) == "none" or share > SHARE or "by=random" in row["sparsity"]:
            continue
        text = (
            f"KL {cell(row['kl'])} nats with {cell(100 * share)} % of the KV {what}; "
            f"{row['sparsity']}, {result['config']['model']}"
        )
        mine = (row["kl"], text, file)
        best[_name(row)] = min(best.get(_name(row), mine), mine)
    return [
        {"kind": "sparsity", "name": name, "result": text, "file": file}
        for name, (_, text, file) in best.items()
    ]
