"""The control plane of an engine from plain data: the same for the engine, simulator and replay."""

from collections.abc import Sequence
from typing import Any, cast

from kvarn.core.model import GroupSpec
from kvarn.core.part import find
from kvarn.kv.evict import Evict
from kvarn.kv.manager import KVManager
from kvarn.kv.prefix import PrefixIndex
from kvarn.schedule import Scheduler
from kvarn.schedule.control import (
    Capacity,
    ControlPlane,
    Filters,
    Keeps,
    Selects,
    keep_all,
    see_all,
    take_whole,
)
from kvarn.schedule.logged import LoggedControl, Write


def build_control(
    groups: Sequence[GroupSpec],
    pages: Sequence[int],
    page_size: int,
    scheduler: str,
    prefix: str,
    evict: str,
    capacity: Capacity,
    write: Write | None = None,
    keeps: Keeps = keep_all,
    selects: Selects = see_all,
    filters: Filters = take_whole,
) -> ControlPlane:
    """Parts by name (`prefix` may be "none"); unknown names are errors that say the nearest.

    `keeps` says what stays of a request's KV, `selects` what is read of it, `filters` what chooses
    the tokens of its prompt that go on.

    With `write` the control plane records every call there (`kvarn.schedule.logged`).
    """
    index: PrefixIndex | None = None
    if prefix != "none":
        windows = [group.window for group in groups]
        policy = cast(Evict, find("evict", evict)())
        make: Any = find("prefix", prefix)  # what its constructor takes, the registry does not know
        index = make(page_size, windows, policy, [g.sink_pages(page_size) for g in groups])
    kv = KVManager(groups, pages, page_size, index)
    part = cast(Scheduler, find("scheduler", scheduler)())
    if write is not None:
        return LoggedControl(part, kv, capacity, keeps, selects, filters, write)
    return ControlPlane(part, kv, capacity, keeps, selects, filters)
