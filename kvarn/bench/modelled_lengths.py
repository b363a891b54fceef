"""`kvarn reproduce draft-lengths`: length controls on modelled machines beside every fixed length.

Nothing is measured: a round's time follows from its rows and drafts, and every position of a text
is accepted with a probability that the proposer knows. So it shows where a control can win, not how
well a drafter knows itself. Times are in steps of one sequence without drafts.
"""

from collections.abc import Callable
from random import Random
from typing import Any

from kvarn.bench import record
from kvarn.core.errors import ConfigError
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.specdec_pp import SpecDecPP
from kvarn.speculate.length.survival import Survival
from kvarn.speculate.length.utility import Utility
from kvarn.speculate.part import LengthControl
from kvarn.speculate.trial import Roofline, Stream, play

MODEL = "modelled"
POSITIONS, SEED = 4000, 0  #: positions of a text
#: machine -> its times; drafts of "moe" cost nothing (n-grams)
MACHINES = {
    #: a verification costs 3.7 drafted tokens more than one (SpecDec++, arXiv 2405.19715: 7B, 70B)
    "dense, costly drafts": Roofline(read=1.0, row=0.001, fixed=0.0, token=1.0 / 4.7),
    "dense, free drafts": Roofline(read=1.0, row=0.01, fixed=0.0),
    #: 4 rows take 2.5 steps: a roofline of Mixtral-8x7B with independent routing, batch 1
    "experts, free drafts": Roofline(read=0.0, row=0.5, fixed=0.5),
}
#: text -> (probability of acceptance, positions), over and over; one position each: at random
TEXTS: dict[str, tuple[tuple[float, int], ...]] = {
    "sure": ((0.9, 1),),
    "poor": ((0.2, 1),),
    "by passage": ((0.9, 200), (0.2, 200)),
    "by token": ((0.97, 1), (0.97, 1), (0.97, 1), (0.3, 1)),
}
LENGTHS = range(1, 8)
CONTROLS: dict[str, Callable[[], LengthControl]] = {
    "specdec-pp": SpecDecPP,
    "utility": Utility,
    "survival": Survival,
}


def run(model: str) -> dict[str, Any]:
    """Speed over no drafts, by machine, text and setting."""
    if model != MODEL:
        raise ConfigError(f"draft-lengths runs no model: leave {model!r} out")
    rows = []
    for machine, times in MACHINES.items():
        for text, parts in TEXTS.items():
            speeds = {
                f"fixed {k}": play(Fixed(), [_stream(parts)], times, k).speedup for k in LENGTHS
            } | {
                name: play(make(), [_stream(parts)], times, LENGTHS[-1]).speedup
                for name, make in CONTROLS.items()
            }
            rows += [
                {"machine": machine, "text": text, "setting": setting, "ratio": speed}
                for setting, speed in speeds.items()
            ]
    workload = {
        "positions": POSITIONS,
        "seed": SEED,
        "texts": {k: list(v) for k, v in TEXTS.items()},
    }
    header = record.header("reproduce-lengths", workload, {"model": model})
    return header | {"experiment": "draft-lengths", "results": rows}


def _stream(parts: tuple[tuple[float, int], ...]) -> Stream:
    chance, shares = Random(SEED), list[float]()
    while len(shares) < POSITIONS:
        if all(count == 1 for _, count in parts):
            shares.append(chance.choice(parts)[0])
        else:
            shares += [share for share, count in parts for _ in range(count)]
    return Stream([chance.random() < share for share in shares], shares)


def lines(result: dict[str, Any]) -> list[str]:
    """A table for people: one line a machine and text, one column a setting."""
    settings, rows = table_of(result)
    out = [f"{'speed over no drafts':36}" + "".join(f"{name:>12}" for name in settings)]
    return out + [f"{name:36}" + "".join(f"{x:>12.2f}" for x in ratios) for name, ratios in rows]


def table_of(result: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """Settings, and by machine and text their ratios; of fixed lengths the best and the worst."""
    found: dict[str, dict[str, float]] = {}
    for row in result["results"]:
        found.setdefault(f"{row['machine']}; {row['text']}", {})[row["setting"]] = row["ratio"]
    rows = []
    for name, ratios in found.items():
        fixed = [ratio for setting, ratio in ratios.items() if setting.startswith("fixed")]
        rows.append((name, [max(fixed), min(fixed), *(ratios[one] for one in CONTROLS)]))
    return ["best fixed", "worst fixed", *CONTROLS], rows
