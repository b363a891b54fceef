"""Grids of measured points: exact at points, linear between, roofline-scaled beyond, fast."""

import timeit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.cost.grid import Grid, line


def bilinear(x: float, y: float) -> float:
    return 1.0 + 2 * x + 3 * y + 0.5 * x * y


def square(sol: bool = True) -> Grid:
    points = [((x, y), bilinear(x, y)) for x in (0, 4, 10) for y in (1, 2, 8)]
    return Grid("square", ("x", "y"), points, (lambda p: p[0] * p[1]) if sol else None)


@given(st.floats(0, 10), st.floats(1, 8))
def test_a_bilinear_function_is_met_everywhere_inside(x: float, y: float) -> None:
    seconds, inside = square().at(x, y)
    assert inside
    assert seconds == pytest.approx(bilinear(x, y))


def test_measured_points_come_back_as_they_are() -> None:
    grid = square()
    assert len(grid) == 9
    for point, seconds in grid.points().items():
        assert grid.at(*point) == (seconds, True)


def test_beyond_the_grid_the_utilisation_of_the_last_point_is_kept() -> None:
    assert square().at(30, 8) == (pytest.approx(bilinear(10, 8) * 3), False)
    assert square().at(10, 16) == (pytest.approx(bilinear(10, 8) * 2), False)
    assert square().at(20, 16) == (pytest.approx(bilinear(10, 8) * 4), False)


def test_below_the_grid_a_launch_gets_no_cheaper() -> None:
    assert square().at(4, 0.5) == (bilinear(4, 1), False)


def test_more_work_is_never_cheaper_beyond_the_grid_even_if_the_roofline_says_so() -> None:
    grid = Grid("odd", ("x",), [((1.0,), 2.0)], lambda p: 1 / p[0])
    assert grid.at(5) == (2.0, False)


def test_a_square_root_axis_meets_a_square() -> None:
    points = [((x,), 3.0 * x * x) for x in (1, 100, 1000)]
    grid = Grid("prefill", ("x",), points, sqrt=("x",))
    assert grid.at(500)[0] == pytest.approx(3 * 500 * 500)
    plain = Grid("prefill", ("x",), points)
    assert plain.at(500)[0] > 1.5 * 3 * 500 * 500


def test_ragged_grids_answer_and_say_where_they_guess() -> None:
    points = [((1.0, 10.0), 1.0), ((1.0, 20.0), 2.0), ((2.0, 10.0), 3.0)]
    grid = Grid("ragged", ("x", "y"), points, lambda p: p[0] * p[1])
    assert grid.at(1, 15) == (1.5, True)
    seconds, inside = grid.at(1.5, 20)  # (2, 20) was not measured: twice (2, 10)
    assert (seconds, inside) == (pytest.approx((2 + 6) / 2), False)


def test_a_left_out_point_is_predicted_from_its_neighbours() -> None:
    grid = Grid("line", ("x",), [((x,), 2.0 * x + 1) for x in (1, 3, 9)])
    assert grid.without(3) == pytest.approx(7)
    assert grid.without(1) is None
    assert Grid("one", ("x",), [((1.0,), 1.0)]).without(1) is None


def test_four_axes() -> None:
    points = [
        ((a, b, c, d), a + 10 * b + 100 * c + 1000 * d + 1.0)
        for a in (0, 2) for b in (0, 2) for c in (0, 2) for d in (0, 2)
    ]  # fmt: skip
    assert Grid("four", ("a", "b", "c", "d"), points).at(1, 0.5, 1.5, 2) == (2157.0, True)


def test_a_line_goes_on_straight() -> None:
    points = [((1.0,), 5.0), ((2.0,), 5.1), ((5.0,), 9.0)]
    grid = Grid("line", ("x",), points, line(points))
    assert grid.at(9) == (pytest.approx(13.0), False)


def test_what_cannot_be_answered_is_refused() -> None:
    with pytest.raises(ConfigError, match="no measured point"):
        Grid("empty", ("x",), [])
    with pytest.raises(ConfigError, match="no time above 0"):
        Grid("zero", ("x",), [((1.0,), 0.0)])
    with pytest.raises(ConfigError, match="no time above 0"):
        Grid("flat", ("x", "y"), [((1.0,), 1.0)])
    with pytest.raises(ConfigError, match="x 11 is beyond the measured 10"):
        square(sol=False).at(11, 2)


def test_a_query_costs_microseconds() -> None:
    points = [((2.0**n, 2.0**k), 2.0**n + k) for n in range(10) for k in range(4, 17)]
    grid = Grid("decode", ("sequences", "positions"), points)
    best = min(timeit.repeat(lambda: grid.at(33, 5000.5), number=2000, repeat=5)) / 2000
    assert best < 20e-6, f"{best * 1e6:.1f} us a query"  # loose: cores are shared
