"""KV that was computed elsewhere and has arrived: it waits in the prefix index like any other."""

from collections.abc import Sequence

from kvarn.core.request import Request, SamplingParams
from kvarn.core.seq import Seq
from kvarn.kv.manager import KVManager


def fill(kv: KVManager, tokens: Sequence[int], now: float) -> int:
    """Enter the whole pages of a prompt's start; leading positions that the index then has.

    Idle pages make way as for any sequence, running ones do not: without room nothing is entered.
    Not while decode steps are taken together (`kvarn.schedule.coast`), which have been promised
    their pages. Full attention only: a window keeps pages that nobody brings.
    """
    size = kv.page_size
    if kv.index is None or kv.has_windows:
        raise ValueError("KV can be entered where there is a prefix index and no sliding window")
    whole = list(tokens[: len(tokens) // size * size])
    seq = Seq(-1, Request("fill", whole, SamplingParams()), 0, whole, len(whole), (0, -1))
    match = kv.index.match(whole, "", len(whole) // size)
    kv.attach(seq, match, now)
    if kv.reserve(seq, len(whole), now) is None:
        kv.release(seq, now, keep=False)
        return match.length * size
    seq.computed = len(whole)
    kv.release(seq, now)
    return len(whole)
