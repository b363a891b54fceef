"""The compiled layout of captured steps is the one of numpy, number for number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.kernels.attention import PagedRows, small_layout, triton_graph
from kvarn.kernels.attention.layout import Heads, paying
from kvarn.kernels.attention.triton_graph import GraphTritonPlan, key_of

pytestmark = pytest.mark.skipif(not small_layout.available(), reason=small_layout.reason())

HEADS = [Heads(32, 8, 128, 2, 132), Heads(8, 8, 64, 2, 16), Heads(12, 2, 128, 4, 1)]
LENGTHS = st.one_of(st.integers(1, 90), st.integers(1, 9000))


@st.composite
def steps(draw: st.DrawFn) -> PagedRows:
    """Spans of a few rows; with a window, or with prefixes that neighbours share, or neither."""
    size, single = draw(st.sampled_from([1, 16, 64])), draw(st.booleans())
    counts = np.array(draw(st.lists(st.integers(0, 5), min_size=1, max_size=24)), np.int64)
    if single:
        counts[:] = 1
    start = np.array([draw(LENGTHS) for _ in counts], np.int64)
    window = draw(st.sampled_from([None, None, 40, 512]))
    base = start * 0
    if window is not None:
        base = np.maximum(start - window + 1, 0) // size * size
    indptr = np.concatenate(([0], np.cumsum(counts)))
    rows = PagedRows(
        indptr=indptr, start=start, page_indptr=np.arange(len(counts)) * 7, pages=start[:0],
        base=base, slots=np.arange(indptr[-1]), page_size=size, scale=1.0, window=window,
        sinks=4 if window and draw(st.booleans()) else 0,
    )  # fmt: skip
    if single and window is None and len(counts) > 3 and draw(st.booleans()):
        most = int(start[:3].min()) // size * size
        rows.shared = np.array([[0, 3, most]]) if most else None
    return rows


def filled(plan: GraphTritonPlan, rows: PagedRows) -> dict[str, np.ndarray]:
    arrays = {name: np.full(count, 77, np.int32) for name, count in plan.sizes.items()}
    plan.fill(rows, arrays)
    return arrays


@given(steps(), st.sampled_from(HEADS), st.sampled_from([0, 1 << 40]))
@settings(max_examples=300, deadline=None)
def test_it_is_the_layout_of_numpy(rows: PagedRows, heads: Heads, pays: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvarn.kernels.attention.layout.SHARED_BYTES", pays)
        key, plan = key_of(rows, heads), GraphTritonPlan(rows, max(1, len(rows.slots)), heads)
        mine = filled(plan, rows)
        patch.setattr(small_layout, "_outcome", lambda: (None, "numpy's turn"))
        assert key == key_of(rows, heads)
        theirs = filled(plan, rows)
    assert {name: x.tolist() for name, x in mine.items()} == {
        name: x.tolist() for name, x in theirs.items()
    }


def test_what_does_not_fit_is_refused_and_nothing_is_written() -> None:
    def lengths(*ends: int) -> PagedRows:
        start = np.array(ends) - 1
        n = len(ends)
        return PagedRows(
            np.arange(n + 1), start, start * 0, start[:0], start * 0, start * 0, 16, 1.0
        )

    heads = HEADS[0]
    plan = GraphTritonPlan(lengths(10), 2, heads)
    room = {name: np.zeros(count, np.int32) for name, count in plan.sizes.items()}
    plan.fill(lengths(10, 90), room)
    for rows in (lengths(10, 20, 30), lengths(50_000)):
        arrays = {name: np.full(count + 8, 77, np.int32) for name, count in plan.sizes.items()}
        with pytest.raises(ConfigError, match="capture one for its own key"):
            plan.fill(rows, arrays | {"slots": np.zeros(9, np.int32)})
        assert all((x == 77).all() for name, x in arrays.items() if name != "slots")
    assert paying(lengths(10), heads).shape == (0, 3)
    assert triton_graph.fits(lengths(10), heads)
