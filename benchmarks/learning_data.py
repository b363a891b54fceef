"""What the simulator knows of drafts and of drafters that learn, out of benchmarks/results.

`table.py` writes it into the package, since an installed kvarn has no benchmarks/. No number is
typed in by hand.
"""

import json
from typing import Any

from cells import ROOT

from kvarn.sim.learnt import FROZEN, LEARNS, LONGER

FILE = ROOT / "kvarn" / "bench" / "learning.json"
MEASURED, BESIDE = "reproduce_online_spec.json", "train_beside_on_h200.json"
GAPS = "verify_gap_h200.json"


def learning_data(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Acceptance by quarter with and without learning; what learning beside steps costs; how long
    the device waits for the host between steps that verify."""
    measured, beside = results[MEASURED], results[BESIDE]
    names = ("setting", "phase", "quarter", "acceptance", "judged")
    training = measured["training"][LEARNS]
    return {
        "files": [MEASURED, BESIDE, GAPS],
        "workload": {name: measured["workload"][name] for name in ("requests", "phases")},
        "training": {LEARNS: {name: training[name] for name in ("published", "seconds")}},
        "gaps": [
            [row["batch"], row["gap_s"]]
            for row in results[GAPS]["results"]
            if row["step"] == "verify"
        ],
        "slowdown": beside["steps"]["beside"]["alike_mean"],
        "results": [
            {name: row[name] for name in names}
            for row in measured["results"]
            if row["setting"] in (FROZEN, LONGER, LEARNS)
        ],
    }


def write(results: dict[str, dict[str, Any]]) -> None:
    """Write it into the package."""
    FILE.write_text(json.dumps(learning_data(results), indent=1) + "\n")
