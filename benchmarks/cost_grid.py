"""Renew the grid of predictions that `tests/unit/test_cost_drift.py` holds new ones against.

    python benchmarks/cost_grid.py

Run it after a change to a cost model that was meant, and commit the file with the change.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

from kvarn.core.errors import ConfigError
from kvarn.cost.build import cost_model
from kvarn.cost.shape import StepShape
from kvarn.models.shapes import named_shape

FILE = Path(__file__).resolve().parent.parent / "tests" / "data" / "cost_grid.json"
MODELS = ("smollm2-135m", "llama-3.1-8b", "gemma-2-9b", "llama-3.1-70b")
DEVICES = ("H100", "A100-80G", "L4", "B200", "CPU")
RANKS = (1, 4)
STEPS = {
    "one decode": StepShape((), 1, 512, 512, 1),
    "64 decodes": StepShape((), 64, 64 * 2048, 8192, 64),
    "one prompt": StepShape(((2048, 2048),), 0, 0, 0, 1),
    "a chunk and decodes": StepShape(((512, 4096),), 32, 32 * 1024, 4096, 33),
}


def predictions() -> dict[str, float | str]:
    """Seconds by case; where a case is refused, the word "refused"."""
    found: dict[str, float | str] = {}
    for model, device, tp in product(MODELS, DEVICES, RANKS):
        cost: Any = None
        try:
            cost = cost_model(named_shape(model), device=device, tp=tp)
        except ConfigError:
            found[f"{model}, {tp} x {device}"] = "refused"
            continue
        for name, shape in STEPS.items():
            found[f"{model}, {tp} x {device}, {name}"] = cost.step(shape).seconds
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(predictions(), indent=1) + "\n")
    print(FILE)
