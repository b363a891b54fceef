"""A cost model fitted to steps that an engine ran: non-negative weights on features of the shape.

Minimised is the relative error: a decode of a millisecond counts as much as a prefill of a second.
Non-negative weights keep the model monotone: more work never takes less time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvarn.core.errors import ConfigError
from kvarn.cost.nnls import nnls
from kvarn.cost.shape import Estimate, StepShape

#: a step that ran: its shape and how long it took [s]
Step = tuple[StepShape, float]

#: tokens at which the time of a step may bend: up at the ridge of a roofline, down where
#: instructions begin to be shared between rows
KNOTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
#: the term of the estimate that a feature counts to
TERMS = {
    "step": "host", "sequences": "host", "chunks": "host",
    "tokens": "linear", "logits": "linear",
    **{f"tokens up to {k}": "linear" for k in KNOTS},
    **{f"tokens beyond {k}": "linear" for k in KNOTS},
    "prefill pairs": "prefill", "decode positions": "decode", "decode skew": "decode",
}  # fmt: skip
NAMES = tuple(TERMS)

#: regimes in which errors are reported
REGIMES = ("decode-only", "prefill-only", "mixed")


def features(shape: StepShape) -> list[float]:
    """What the time of a step may be made of, in the order of `NAMES`."""
    n = shape.n_tokens
    pairs = sum(rows * (context - rows / 2) for rows, context in shape.chunks)
    return [
        1.0, float(shape.n_seqs), float(len(shape.chunks)),
        float(n), float(shape.n_logits),
        *(float(min(n, k)) for k in KNOTS),
        *(float(max(0, n - k)) for k in KNOTS),
        pairs, float(shape.decode_sum),
        float(shape.n_decode * shape.decode_max - shape.decode_sum),
    ]  # fmt: skip


@dataclass(slots=True)
class Fitted:
    """Seconds = weights . features; `low` and `high` bound the features that were seen."""

    name: str
    weights: list[float]
    low: list[float]
    high: list[float]
    busy_watts: float = 0.0
    idle: float = 0.0  #: [W]
    about: dict[str, Any] = field(default_factory=dict)  #: what it was fitted to

    def step(self, shape: StepShape) -> Estimate:
        """Time and energy of a step; confidence is the share made by features seen as large."""
        out = Estimate()
        inside = 0.0
        values = features(shape)
        for term, weight, value, low, high in zip(
            TERMS.values(), self.weights, values, self.low, self.high, strict=True
        ):
            if weight and value:
                seconds = weight * value
                setattr(out, term, getattr(out, term) + seconds)
                inside += seconds if low <= value <= high else 0.0
        total = out.seconds
        out.confidence = min(1.0, inside / total) if total else 0.0
        out.joules = total * self.busy_watts
        return out

    def idle_watts(self) -> float:
        """Power of the instance while it waits [W]; 0 where none was given."""
        return self.idle

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        kept: dict[str, Any] = {"kind": "fitted", "name": self.name, "about": self.about}
        kept |= {"busy_watts": self.busy_watts, "idle_watts": self.idle}
        kept["features"] = {
            name: {"weight": weight, "low": low, "high": high}
            for name, weight, low, high in zip(
                NAMES, self.weights, self.low, self.high, strict=True
            )
        }
        Path(path).write_text(json.dumps(kept, indent=1) + "\n")


def fit(steps: Sequence[Step], name: str = "fitted") -> Fitted:
    """The model with the least squared relative error on `steps`."""
    good = [(shape, seconds) for shape, seconds in steps if shape.n_tokens]
    if not good:
        raise ConfigError("no step with tokens to fit a cost model to")
    if min(seconds for _, seconds in good) <= 0:
        raise ConfigError("a step of 0 s or less cannot be fitted; is the log in seconds?")
    values = [features(shape) for shape, _ in good]
    scaled = [
        [value / seconds for value in row] for row, (_, seconds) in zip(values, good, strict=True)
    ]
    columns = list(zip(*values))
    weights = nnls(scaled, [1.0] * len(good))
    about = {"steps": len(good)}
    return Fitted(name, weights, list(map(min, columns)), list(map(max, columns)), about=about)


def loaded(found: dict[str, Any], path: str) -> Fitted:
    """A saved model out of its JSON; `path` is what errors name."""
    kept = found.get("features", {})
    if set(kept) != set(NAMES):
        raise ConfigError(
            f"{path} was fitted on other features ({', '.join(kept) or 'none'}): fit it again"
        )
    rows = [kept[name] for name in NAMES]
    low, high = [row["low"] for row in rows], [row["high"] for row in rows]
    return Fitted(
        found["name"], [row["weight"] for row in rows], low, high,
        found["busy_watts"], found["idle_watts"], found["about"],
    )  # fmt: skip


@dataclass(slots=True)
class Errors:
    """How far predictions are from measured steps."""

    n: int
    mape: float  #: mean of |predicted / measured - 1|
    bias: float  #: sum of predictions over sum of measurements, less 1
    p95: float  #: 95th percentile of |predicted / measured - 1|
    extrapolated: float  #: mean share of predicted seconds outside the fitted range


def regime(shape: StepShape) -> str:
    """Which of `REGIMES` a step belongs to."""
    if not shape.chunks:
        return "decode-only"
    return "mixed" if shape.n_decode else "prefill-only"


def errors(pairs: Sequence[tuple[Estimate, float]]) -> Errors:
    """Errors of estimates against seconds measured."""
    if not pairs:
        raise ConfigError("no prediction to judge")
    off = sorted(abs(guess.seconds / seconds - 1) for guess, seconds in pairs)
    total = sum(seconds for _, seconds in pairs)
    return Errors(
        n=len(pairs),
        mape=sum(off) / len(off),
        bias=sum(guess.seconds for guess, _ in pairs) / total - 1,
        p95=off[max(0, -(-95 * len(off) // 100) - 1)],
        extrapolated=sum(1 - guess.confidence for guess, _ in pairs) / len(pairs),
    )


def held_out(steps: Sequence[Step], folds: int = 5) -> dict[str, Errors]:
    """Errors by regime (and "all") on steps that each fit did not see: every `folds`-th step."""
    good = [(shape, seconds) for shape, seconds in steps if shape.n_tokens]
    if not 2 <= folds <= len(good):
        raise ConfigError(f"{len(good)} steps cannot be judged in {folds} folds")
    found: dict[str, list[tuple[Estimate, float]]] = {}
    for i in range(folds):
        model = fit([step for j, step in enumerate(good) if j % folds != i])
        for shape, seconds in good[i::folds]:
            pair = (model.step(shape), seconds)
            found.setdefault(regime(shape), []).append(pair)
            found.setdefault("all", []).append(pair)
    return {name: errors(found[name]) for name in (*REGIMES, "all") if name in found}
