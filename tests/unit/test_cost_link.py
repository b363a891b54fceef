"""Links alone and shared: time by hand, fairness, conservation of bytes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.cost.link import LINKS, Link, find_link
from kvarn.sim.heap import NS
from kvarn.sim.links import SharedLink

GB = Link("one GB/s", 0.0, 1e9, 0.0)  # a byte takes a nanosecond
LATE = Link("late", 100e-9, 1e9, 10e-9)


def run(link: SharedLink) -> dict[str, int]:
    """Arrival of everything under way [ns]."""
    ends = {}
    while (end := link.next_end()) is not None:
        for one in link.finish(end):
            ends[one] = end
    return ends


def test_a_transfer_alone_is_latency_pieces_and_bytes() -> None:
    assert LATE.seconds(1000, 3) == pytest.approx(100e-9 + 3 * 10e-9 + 1000e-9)
    link = SharedLink(LATE)
    link.start(50, "a", 1000, calls=3)
    assert link.next_end() == 50 + 100 + 30 + 1000
    assert link.finish(1179) == []
    assert link.finish(1180) == ["a"]
    assert link.next_end() is None and len(link) == 0


def test_two_transfers_take_twice_as_long_each() -> None:
    link = SharedLink(GB)
    link.start(0, "a", 1000)
    link.start(0, "b", 1000)
    assert run(link) == {"a": 2000, "b": 2000}


def test_latency_is_not_shared_and_pieces_are() -> None:
    link = SharedLink(LATE)
    link.start(0, "a", 1000, calls=2)
    link.start(0, "b", 1000, calls=2)
    assert run(link) == {"a": 2140, "b": 2140}


def test_a_late_comer_slows_the_first_by_what_they_share() -> None:
    link = SharedLink(GB)
    link.start(0, "long", 1000)
    link.start(600, "short", 100)
    # both go at half speed for 200 ns; then the first has 300 left
    assert run(link) == {"short": 800, "long": 1100}


def test_cancelling_gives_the_rest_to_the_others() -> None:
    link = SharedLink(GB)
    link.start(0, "a", 1000)
    link.start(0, "b", 1000)
    link.cancel(1000, "b")
    assert run(link) == {"a": 1500}
    assert link.moved == pytest.approx(1500)
    with pytest.raises(KeyError):
        link.cancel(1500, "b")


def test_misuse_is_refused() -> None:
    link = SharedLink(GB)
    link.start(10, "a", 1000)
    with pytest.raises(ValueError, match="'a' is under way"):
        link.start(10, "a", 1)
    with pytest.raises(ValueError, match="before the link's clock"):
        link.finish(9)
    with pytest.raises(ValueError, match="bytes and calls"):
        link.start(10, "b", -1)
    with pytest.raises(ConfigError, match="positive bandwidth"):
        Link("none", 0, 0, 0)
    with pytest.raises(ConfigError, match="did you mean 'rdma400'"):
        find_link("rdma4000")


TRANSFERS = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 3000), st.integers(0, 3)),
    min_size=1,
    max_size=30,
)


@given(TRANSFERS)
def test_bytes_are_conserved_and_the_link_never_idles_with_work(
    transfers: list[tuple[int, int, int]],
) -> None:
    link = SharedLink(LATE)
    ends: dict[str, int] = {}
    free, transfers = 0, sorted(transfers)  # when a link that serves in any order is through
    for i, (at, n_bytes, calls) in enumerate(transfers):
        while (end := link.next_end()) is not None and end <= at:
            ends |= dict.fromkeys(link.finish(end), end)
        link.start(at, str(i), n_bytes, calls)
        free = max(free, at) + n_bytes + 10 * calls
    ends |= run(link)
    assert len(ends) == len(transfers)
    assert link.moved == sum(n_bytes for _, n_bytes, _ in transfers)
    assert abs(max(ends.values()) - (free + 100)) <= len(transfers)  # work is conserved
    for i, (at, n_bytes, calls) in enumerate(transfers):
        assert ends[str(i)] >= at + n_bytes + 10 * calls + 100  # nobody is faster than alone


@given(st.integers(1, 40), st.integers(1, 10**9))
def test_equal_transfers_share_equally(n: int, n_bytes: int) -> None:
    link = SharedLink(GB)
    for i in range(n):
        link.start(0, str(i), n_bytes)
    assert set(run(link).values()) == {n * n_bytes}


def test_cancelled_and_arrived_bytes_equal_the_busy_time() -> None:
    rng = random.Random(4)
    link, now, live, arrived = SharedLink(GB), 0, [], 0
    link.start(0, "keeper", 10**9)  # keeps the link busy
    for i in range(300):
        now += rng.randrange(2000)
        done = link.finish(now)
        arrived += len(done)
        live = [one for one in live if one not in done]
        if live and rng.random() < 0.2:
            link.cancel(now, live.pop(rng.randrange(len(live))))
        else:
            link.start(now, str(i), rng.randrange(1, 1000))
            live.append(str(i))
    for one in [*live, "keeper"]:
        link.cancel(now, one)
    assert link.moved == pytest.approx(now, abs=arrived)  # each left on a whole nanosecond
    assert arrived > 20


def test_presets_name_their_source_and_are_ordered() -> None:
    size = 1 << 30
    slow_to_fast = ("ethernet25", "rdma100", "rdma200", "rdma400", "nvlink3", "nvlink4", "nvlink5")
    times = [find_link(name).seconds(size) for name in slow_to_fast]
    assert times == sorted(times, reverse=True)
    assert all(link.source for link in LINKS.values())
    # 8B KV of 4096 tokens in whole, and in pieces of 32 KiB: fragmentation is what costs
    pcie = find_link("pcie5")
    assert pcie.seconds(4096 * 131072, 16384) > 5 * pcie.seconds(4096 * 131072)
    assert round(pcie.seconds(0) * NS) == 15_000
