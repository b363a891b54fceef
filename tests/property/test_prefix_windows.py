"""How much of a cached prefix can be used where groups see windows: all that any choice allows."""

from hypothesis import given
from hypothesis import strategies as st

from kvarn.core.part import find
from kvarn.kv.prefix import NO_PAGE

SIZE = 4  #: positions of a page
groups = st.integers(0, 8).flatmap(
    lambda length: st.lists(
        st.tuples(
            st.sampled_from([None, 1, 4, 6, 13]),  # a window [positions]
            st.integers(0, 2),  # pages of sinks
            st.lists(st.booleans(), min_size=length, max_size=length),  # which pages are there
        ),
        min_size=1,
        max_size=4,
    )
)


@given(groups)
def test_the_longest_prefix_that_every_group_has(
    groups: list[tuple[int | None, int, list[bool]]],
) -> None:
    windows, sinks = [window for window, _, _ in groups], [count for _, count, _ in groups]
    index = find("prefix", "radix")(SIZE, windows, find("evict", "lru")(), sinks)  # type: ignore[call-arg]
    there = [[window is None or has for has in pages] for window, _, pages in groups]
    pages = [[1 if has else NO_PAGE for has in some] for some in there]

    def seen(length: int) -> bool:
        for window, count, some in zip(windows, sinks, there, strict=True):
            if window is not None:
                first = max(0, length * SIZE - window + 1) // SIZE
                if not all(some[first:length]) or not all(some[: min(count, length)]):
                    return False
        return True

    best = max(length for length in range(len(pages[0]) + 1) if seen(length))
    assert index._usable(pages) == best  # type: ignore[attr-defined]
