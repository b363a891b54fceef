"""Length controls on real texts in modelled time: what is compared, and its tables."""

import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import speculation_sections

from kvarn.bench import gamma_study
from kvarn.bench.experiments import find
from kvarn.bench.gamma_study import Text
from kvarn.speculate.chains import Chain
from kvarn.speculate.trial import Roofline


def text(kind: str, share: float, chance: Random) -> Text:
    """A request of which each token is accepted with such a probability."""
    answer = [chance.randrange(1000) for _ in range(80)]
    good = [chance.random() < share for _ in range(200)]
    chains = list[Chain]()
    for place in range(79):
        stands = good[place + 1 :].index(False)
        said = [share] * gamma_study.LONGEST
        chains.append(Chain(said, min(stands, gamma_study.LONGEST), said))
    return Text(kind, [1, 2, 3], answer, chains)


def test_controls_are_held_against_hindsight():
    chance = Random(0)
    texts = [text(kind, p, chance) for _ in range(6) for kind, p in (("code", 0.95), ("talk", 0.3))]
    costs = Roofline(read=1.0, row=0.0, fixed=0.0, token=0.1)
    rows = gamma_study.compared(texts, "draft", "flat", costs)
    found = {row["setting"].split(" (")[-1]: row for row in rows}
    best = found["best)"]
    assert best["share"]["mixed"] == 1.0 == best["spread"] == found["safest)"]["over_safest"]
    assert all(share <= 1.0 for share in best["share"].values())
    oracle = found["oracle"]
    assert oracle["speed"] == max(row["speed"] for row in rows)
    assert oracle["drafted"] == 12 * 79 - oracle["rounds"]  # all of them stood
    assert found["gammatune"]["share"]["mixed"] > 1.0  # one length does not fit both
    said = {
        "workload": {"each": 6}, "date": "today", "git_commit": None, "rows": rows,
        "prices": [{"proposer": "draft", **gamma_study._prices(costs)}],
    }  # fmt: skip
    assert sum("gammatune" in line for line in gamma_study.modelled_lines(said)) == 3
    page = "\n".join(speculation_sections.modelled(said))
    assert "| oracle |" in page and "machine: flat" in page


def test_the_experiment_is_known_by_its_name():
    assert find("gammatune").run is gamma_study.run
