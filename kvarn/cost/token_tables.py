"""Whole phases by tokens: Splitwise's measured prompt and token times, as splitwise-sim uses them.

`splitwise_perf_model.csv.gz` (Mutinifni/splitwise-sim, MIT): prompt time [ms] by prompt tokens of
the batch, token time [ms] by sequences, medians over repeats; host time is in them. A step with
both takes the prompt time x 1.1 (splitwise-sim's rule). Contexts do not count, so a step says
`confidence` for its number of tokens only: the decodes were measured at contexts near 512.
"""

import statistics
from pathlib import Path

from kvarn.core.errors import ConfigError
from kvarn.cost.grid import Grid, Point, line
from kvarn.cost.shape import Estimate, StepShape
from kvarn.cost.table_files import number, rows

#: a step with prompts and decodes over one with the prompts alone (splitwise-sim)
MIXED = 1.1
#: prompt length at which token times by batch size were measured [tokens]
DECODE_PROMPT = "512"


class TokenTables:
    """Prices steps of one of the file's (model, hardware, tensor parallel) triples."""

    def __init__(
        self, path: Path, model: str, device: str, tp: int, *,
        busy_watts: float = 0.0, idle_watts: float = 0.0,
    ) -> None:  # fmt: skip
        """`model` and `device` are words of the file: llama2-70b, h100-80gb."""
        self.name = f"splitwise_{model}_{device}_tp{tp}"
        self.busy_watts, self._idle_watts = busy_watts, idle_watts
        only = {"model": model, "hardware": device, "tensor_parallel": str(tp)}
        found = list(rows(path, only))
        if not found:
            names = ("model", "hardware", "tensor_parallel")
            known = sorted({tuple(row[name] for name in names) for row in rows(path)})
            raise ConfigError(f"{path} has no {model} on {device} with tp={tp}; it has: {known}")
        prompt: dict[Point, list[float]] = {}
        token: dict[Point, list[float]] = {}
        for row in found:
            batch = number(row, "batch_size", path)
            key = (batch * number(row, "prompt_size", path),)
            prompt.setdefault(key, []).append(number(row, "prompt_time", path) / 1000)
            if row["prompt_size"] == DECODE_PROMPT:
                token.setdefault((batch,), []).append(number(row, "token_time", path) / 1000)
        self._prompt = Grid(f"prompt time of {self.name}", ("tokens",), _medians(prompt), _size)
        self._token = Grid(
            f"token time of {self.name}", ("sequences",), _medians(token), line(_medians(token))
        )

    def step(self, shape: StepShape) -> Estimate:
        """Time and energy of a step; all of it stands under `linear`."""
        if shape.n_tokens == 0:
            return Estimate()
        if shape.chunks:
            seconds, inside = self._prompt.at(shape.n_tokens)
            seconds *= MIXED if shape.n_decode else 1.0
        else:
            seconds, inside = self._token.at(shape.n_decode)
        return Estimate(linear=seconds, confidence=float(inside), joules=seconds * self.busy_watts)

    def idle_watts(self) -> float:
        """Power of the instance while it waits [W]; 0 where none was given."""
        return self._idle_watts


def _medians(found: dict[Point, list[float]]) -> list[tuple[Point, float]]:
    return [(point, statistics.median(values)) for point, values in found.items()]


def _size(point: Point) -> float:
    return point[0]
