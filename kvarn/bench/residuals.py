"""How wrong the time model was: log-deviations of an `Estimate`'s terms, from a validation's file.

Two kinds of file are read, told apart by their keys: `steps` (errors of single steps by regime, of
benchmarks/validate_engine.py) and `points` (predicted and measured TTFT and TPOT, of
benchmarks/validate_sim.py). Decode attention is as wrong as decode-only steps (TPOT), prefill
attention as prefill-only ones (TTFT; mixed steps where a run had few), and the terms of both as
all together.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

from kvarn.bench import record
from kvarn.core.errors import ConfigError
from kvarn.cost.perturb import TERMS

#: validations that the source tree holds
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
#: read where no file is named: held-out steps of that device; else the points of public runs
PUBLISHED = {"h100": "sim_h100.json", "h200": "sim_h200.json", "cpu": "sim_cpu.json"}
OTHERS = "sim_validation.json"
WIDEST = 3.0  #: log-deviations are looked for up to here
FEW = 20  #: steps of a kind that say nothing of others


@dataclass(slots=True)
class Residuals:
    """Log-deviations by term, and where they come from."""

    sigma: dict[str, float]
    source: str


def read(path: str | None, device: str = "") -> Residuals:
    """Residuals of a file; by default of the published validation of the simulated device."""
    published = RESULTS / PUBLISHED.get(device.lower(), OTHERS)
    if path is None and not published.is_file():
        raise ConfigError(
            "no published residuals beside this installation; name the JSON of "
            "benchmarks/validate_engine.py or benchmarks/validate_sim.py with --residuals"
        )
    name = path or str(published)
    found = record.read(name)
    if isinstance(found.get("steps"), dict):
        sigma, kind = of_steps(found["steps"], name), "errors of single steps"
    elif isinstance(found.get("points"), list):
        sigma, kind = of_points(found["points"], name), "TPOT and TTFT of measured points"
    else:
        raise ConfigError(f"{name} holds neither 'steps' nor 'points' of a validation")
    return Residuals(sigma, f"{Path(name).name} of {found.get('date', 'no date')}: {kind}")


def of_steps(steps: dict[str, Any], name: str) -> dict[str, float]:
    """Log-deviations out of the mean absolute errors by regime, bias included."""
    try:
        mapes = {
            kind: one["mape"]
            for kind, one in steps.items()
            if kind == "all" or one.get("n", FEW) >= FEW
        }
        known = {
            term: next(mapes[kind] for kind in (*_REGIMES.get(term, ()), "all") if kind in mapes)
            for term in TERMS
        }
    except (KeyError, TypeError, StopIteration):
        raise ConfigError(f"{name}: 'steps' lacks 'all' or an error's 'mape'") from None
    return {term: sigma_of(mape) for term, mape in known.items()}


def of_points(points: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Log-deviations of measured over predicted about 1, bias included."""
    logs: dict[str, list[float]] = {"tpot": [], "ttft": []}
    try:
        for one in points:
            for key, found in logs.items():
                found.append(math.log(one["measured"][key] / one["predicted"][key]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise ConfigError(f"{name}: a point lacks a positive TTFT or TPOT") from None
    if not points:
        raise ConfigError(f"{name} holds no points")
    both = _rms(logs["tpot"] + logs["ttft"])
    own = {"decode": _rms(logs["tpot"]), "prefill": _rms(logs["ttft"])}
    return {term: own.get(term, both) for term in TERMS}


def sigma_of(mape: float) -> float:
    """The log-deviation of a lognormal of median 1 whose mean |x - 1| is `mape`.

    That mean is exp(s^2 / 2) (2 Phi(s) - 1), which grows with s; found by bisection.
    """
    phi = NormalDist().cdf
    low, high = 0.0, WIDEST
    if not 0 <= mape <= math.exp(high**2 / 2):
        raise ConfigError(f"a mean absolute error must be at least 0 and below 90, got {mape}")
    while high - low > 1e-12:
        middle = (low + high) / 2
        if math.exp(middle**2 / 2) * (2 * phi(middle) - 1) < mape:
            low = middle
        else:
            high = middle
    return low


def _rms(values: list[float]) -> float:
    return math.sqrt(fmean(value * value for value in values))


#: steps that tell a term's error; the first kind that a validation has
_REGIMES = {"decode": ("decode-only",), "prefill": ("prefill-only", "mixed")}
