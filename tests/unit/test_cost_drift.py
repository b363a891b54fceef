"""Drift of the cost model (trust protocol T6): what was priced still is; changes are told."""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOLD = 1e-4  #: relative change from which a prediction is reported


def grid() -> Any:
    """The script that makes the grid."""
    spec = importlib.util.spec_from_file_location("cost_grid", ROOT / "benchmarks/cost_grid.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drift(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(cases that worked and are gone or refused, cases whose time changed)."""
    broken, changed = [], []
    for case, before in old.items():
        after = new.get(case, "refused")
        if before != "refused" and after == "refused":
            broken.append(case)
        elif before != "refused" and abs(after / before - 1) > TOLD:
            changed.append(f"{case}: {before:.4g} s, now {after:.4g} s")
    return broken, changed


def test_what_was_priced_is_still_priced():
    old = json.loads((ROOT / "tests/data/cost_grid.json").read_text())
    broken, changed = drift(old, grid().predictions())
    for line in changed:
        warnings.warn(f"{line} (python benchmarks/cost_grid.py renews the grid)", stacklevel=1)
    assert len(old) > 100 and not broken, broken


def test_the_gate_tells_what_broke_from_what_changed():
    old = {"a": 1.0, "b": 1.0, "c": 1.0, "d": "refused", "e": 1.0}
    new = {"a": 1.00001, "b": 1.01, "c": "refused", "d": 2.0}
    assert drift(old, new) == (["c", "e"], ["b: 1 s, now 1.01 s"])
