"""Measured steps as plain JSON rows: what `kvarn profile` writes and cost models read."""

from typing import Any

from kvarn.core.errors import ConfigError
from kvarn.cost.shape import StepShape


def to_row(shape: StepShape, seconds: float) -> dict[str, Any]:
    """A step and its time [s] as a JSON object."""
    return {
        "chunks": [list(chunk) for chunk in shape.chunks],
        "n_decode": shape.n_decode,
        "decode_sum": shape.decode_sum,
        "decode_max": shape.decode_max,
        "n_logits": shape.n_logits,
        "seconds": seconds,
    }


def of_row(row: dict[str, Any]) -> tuple[StepShape, float]:
    """The step and its time [s] out of a JSON object; further fields are left alone."""
    try:
        chunks = tuple((int(rows), int(context)) for rows, context in row["chunks"])
        shape = StepShape(
            chunks, row["n_decode"], row["decode_sum"], row["decode_max"], row["n_logits"]
        )
        return shape, float(row["seconds"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"no step that was measured: {row} ({error})") from None
