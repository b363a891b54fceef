"""Measured points on a grid of one to four axes: linear between them, roofline-scaled beyond.

Axes are nested, so that a grid may be ragged: the values of an inner axis depend on the outer
ones. Between points seconds are interpolated linearly, not in log space (log space cost
LLMServingSim a factor of four in leave-one-out error); along `sqrt` axes their root is, for time
that grows with a square. Above an axis the efficiency of its last point is kept:
`t(q) = SOL(q) / util(last)` with `util = SOL(last) / t(last)` (AIConfigurator, arXiv 2601.06288).
Below an axis the first point's time stands: launching a kernel does not get cheaper.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

from kvarn.core.errors import ConfigError

Point = tuple[float, ...]
#: least time that hardware needs for the work at a point (any unit: only ratios are used)
SOL = Callable[[Point], float]
#: sorted keys of an axis, and under each the next axis, or seconds
_Node = tuple[list[float], list[Any]]


class Grid:
    """Seconds by `axes`; `name` is what errors call it."""

    def __init__(
        self,
        name: str,
        axes: tuple[str, ...],
        points: Iterable[tuple[Point, float]],
        sol: SOL | None = None,
        sqrt: tuple[str, ...] = (),
    ) -> None:
        """`points` are (coordinates, seconds); the last of equal coordinates counts.

        Raises `ConfigError` where there is no point, or one that cannot be a measurement.
        """
        self.name = name
        self.axes = axes
        self.sol = sol
        self._root = [axis in sqrt for axis in axes]
        self._points = dict(points)
        if not self._points:
            raise ConfigError(f"{name}: no measured point to predict from")
        for point, seconds in self._points.items():
            if len(point) != len(axes) or not 0 < seconds < float("inf"):
                raise ConfigError(
                    f"{name}: {point} -> {seconds} is no time above 0 at ({', '.join(axes)})"
                )
        self._tree = _nest(self._points, 0, len(axes))

    def __len__(self) -> int:
        return len(self._points)

    def points(self) -> dict[Point, float]:
        """Every measured point: coordinates to seconds."""
        return dict(self._points)

    def at(self, *query: float) -> tuple[float, bool]:
        """Seconds at `query`, and whether it lies inside the measured range on every axis."""
        return self._at(self._tree, 0, query)

    def without(self, *point: float) -> float | None:
        """Seconds at `point` predicted from all others; None if that is no interpolation."""
        rest = _drop(self._tree, point)
        if rest is None:
            return None
        seconds, inside = self._at(rest, 0, point)
        return seconds if inside else None

    def _at(self, node: _Node, level: int, query: Point) -> tuple[float, bool]:
        keys, below = node
        x = query[level]
        i = bisect_left(keys, x)
        if i == len(keys):
            return self._above(keys[-1], below[-1], level, query)
        high = keys[i]
        if high == x:
            return self._below(below[i], level, query)
        if i == 0:
            return self._below(below[0], level, _moved(query, level, high))[0], False
        low = keys[i - 1]
        a, inside_a = self._below(below[i - 1], level, _moved(query, level, low))
        b, inside_b = self._below(below[i], level, _moved(query, level, high))
        share = (x - low) / (high - low)
        if self._root[level]:
            root = a**0.5 + share * (b**0.5 - a**0.5)
            return root * root, inside_a and inside_b
        return a + share * (b - a), inside_a and inside_b

    def _below(self, found: Any, level: int, query: Point) -> tuple[float, bool]:
        """Go on to the next axis; on the last one `found` is the time."""
        if level + 1 == len(self.axes):
            return found, True
        return self._at(found, level + 1, query)

    def _above(self, last: float, found: Any, level: int, query: Point) -> tuple[float, bool]:
        if self.sol is None:
            raise ConfigError(
                f"{self.name}: {self.axes[level]} {query[level]:g} is beyond the measured "
                f"{last:g}, and nothing says how to go on from there"
            )
        anchor = _moved(query, level, last)
        seconds, _ = self._below(found, level, anchor)
        least = self.sol(anchor)
        if least <= 0:  # no work at the anchor: its time is what a launch costs
            return seconds, False
        return seconds * max(1.0, self.sol(query) / least), False


def line(points: Iterable[tuple[Point, float]]) -> SOL:
    """A straight line through the first and the last of points on one axis, to go on along."""
    ordered = sorted(points)
    (first,), start = ordered[0]
    (last,), end = ordered[-1]
    slope = (end - start) / (last - first) if last > first else 0.0
    return lambda point: start + slope * (point[0] - first)


def _moved(query: Point, level: int, value: float) -> Point:
    return (*query[:level], value, *query[level + 1 :])


def _nest(points: dict[Point, float], level: int, n_axes: int) -> _Node:
    by_key: dict[float, dict[Point, float]] = {}
    for point, seconds in points.items():
        by_key.setdefault(point[level], {})[point] = seconds
    keys = sorted(by_key)
    if level + 1 == n_axes:
        return keys, [next(iter(by_key[key].values())) for key in keys]
    return keys, [_nest(by_key[key], level + 1, n_axes) for key in keys]


def _drop(node: _Node, point: Point) -> _Node | None:
    """`node` without `point`, branches that are left empty gone as well; None: nothing left."""
    keys, below = node
    i = keys.index(point[0])
    rest = _drop(below[i], point[1:]) if len(point) > 1 else None
    if rest is not None:
        return keys, [*below[:i], rest, *below[i + 1 :]]
    if len(keys) == 1:
        return None
    return [*keys[:i], *keys[i + 1 :]], [*below[:i], *below[i + 1 :]]
