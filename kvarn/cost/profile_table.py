"""A cost model from what `kvarn profile` measured: whole steps of this engine on this machine.

Decode steps are a grid by (sequences, mean context), prefill steps one by (rows, past). A step of
several parts takes their sum less what they share, since weights are read and layers launched
once: `t = sum of parts - beta (parts - 1) floor`, where floor is the shortest decode step measured
and beta in [0, 1] is fitted to the profile's own mixed steps.
"""

from typing import Any

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.cost.grid import Grid, Point
from kvarn.cost.rows import of_row
from kvarn.cost.shape import Chunk, Estimate, StepShape


class ProfileTable:
    """Prices steps of the engine that was profiled. Host time is part of what was measured."""

    def __init__(
        self,
        found: dict[str, Any],
        path: str,
        spec: ModelSpec,
        *,
        busy_watts: float = 0.0,
        idle_watts: float = 0.0,
    ) -> None:
        """`found` is the profile's JSON. Raises `ConfigError` for another model's profile."""
        _check(found, path, spec)
        self.name = f"profile_{found['spec']['name']}"
        self.pages: list[int] = found["pages"]  #: of the KV pool by group, as the engine had them
        self.busy_watts, self._idle_watts = busy_watts, idle_watts
        steps = [of_row(row) for row in found["rows"]]
        decodes = [((s.n_decode, _mean(s)), t) for s, t in steps if not s.chunks]
        prefills = [
            ((s.chunks[0][0], s.chunks[0][1] - s.chunks[0][0]), t)
            for s, t in steps
            if len(s.chunks) == 1 and not s.n_decode
        ]
        kv, weights = _kv_per_token(spec), float(spec.n_params())
        width = 2 * spec.n_heads * spec.head_dim * spec.n_layers

        def read(point: Point) -> float:
            n, context = point
            return weights + n * context * kv

        def multiplied(point: Point) -> float:
            rows, past = point
            return rows * (weights + width * (past + rows / 2))

        self._decode = Grid(f"decodes of {path}", ("sequences", "context"), decodes, read)
        self._prefill = Grid(f"prefills of {path}", ("rows", "past"), prefills, multiplied)
        self.floor = min(seconds for _, seconds in decodes)
        self.beta = 0.0
        self.beta = self._shared([(s, t) for s, t in steps if _parts(s) > 1])

    def step(self, shape: StepShape) -> Estimate:
        """Time and energy of a step: `prefill` and `decode` are whole parts, weights included."""
        out = Estimate()
        if not shape.n_tokens:
            return out
        measured = 0.0
        for chunk in shape.chunks:
            seconds, inside = self._chunk(chunk)
            out.prefill += seconds
            measured += seconds if inside else 0.0
        if shape.n_decode:
            out.decode, inside = self._decode.at(shape.n_decode, _mean(shape))
            measured += out.decode if inside else 0.0
        total = out.prefill + out.decode
        out.confidence = measured / total
        share = 1 - self.beta * (_parts(shape) - 1) * self.floor / total
        out.prefill, out.decode = out.prefill * share, out.decode * share
        out.joules = out.seconds * self.busy_watts
        return out

    def idle_watts(self) -> float:
        """Power of the instance while it waits [W]; 0 where none was given."""
        return self._idle_watts

    def _chunk(self, chunk: Chunk) -> tuple[float, bool]:
        rows, context = chunk
        return self._prefill.at(rows, context - rows)

    def _shared(self, steps: list[tuple[StepShape, float]]) -> float:
        """Least squares of what mixed steps take less than the sum of their parts."""
        above = below = 0.0
        for shape, seconds in steps:
            most = (_parts(shape) - 1) * self.floor / seconds
            above += most * (self.step(shape).seconds / seconds - 1)
            below += most * most
        return min(1.0, max(0.0, above / below)) if below else 0.0


def _parts(shape: StepShape) -> int:
    return len(shape.chunks) + (shape.n_decode > 0)


def _mean(shape: StepShape) -> float:
    return shape.decode_sum / shape.n_decode


def _kv_per_token(spec: ModelSpec) -> float:
    """Elements of K and V of one position."""
    return 2.0 * spec.n_layers * spec.n_kv_heads * spec.head_dim


def _check(found: dict[str, Any], path: str, spec: ModelSpec) -> None:
    missing = [name for name in ("spec", "pages", "rows") if name not in found]
    if missing:
        raise ConfigError(f"{path} is no profile: it has no {missing[0]!r}")
    for name in ("n_layers", "hidden", "ffn", "n_heads", "n_kv_heads", "vocab"):
        there, mine = found["spec"].get(name), getattr(spec, name)
        if there != mine:
            raise ConfigError(
                f"{path} was measured with {found['spec'].get('name')}, whose {name} is {there}; "
                f"{spec.name} has {mine}: run `kvarn profile` with it"
            )
