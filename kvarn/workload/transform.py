"""Stretching, thinning and cutting traces. Each step is recorded in the trace's `chain`."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

from kvarn.core.errors import ConfigError
from kvarn.workload import arrivals
from kvarn.workload.trace import Trace, TraceRequest


def time_warp(trace: Trace, speed: float) -> Trace:
    """Arrivals `speed` times as fast: order and correlation stay, bursts get sharper."""
    if not 0 < speed < math.inf:
        raise ConfigError(f"speed must be above 0 and finite, got {speed}")
    requests = tuple(replace(one, at=one.at / speed) for one in trace)
    return trace.changed(f"time_warp({speed:g})", requests)


def thin(trace: Trace, share: float, seed: int = 0) -> Trace:
    """Keep a random `share` of the sessions, whole: burst shape stays, reuse gets rarer."""
    if not 0 < share <= 1:
        raise ConfigError(f"share must be in (0, 1], got {share}")
    rng, kept = Random(f"thin {seed}"), dict[str, bool]()
    requests = []
    for one in trace:
        key = one.session or one.id
        if kept.setdefault(key, rng.random() < share):
            requests.append(one)
    return trace.changed(f"thin({share:g}, seed={seed})", tuple(requests))


def limit(trace: Trace, n: int) -> Trace:
    """The first `n` requests."""
    if n < 1:
        raise ConfigError(f"limit must be at least 1, got {n}")
    return trace.changed(f"limit({n})", trace.requests[:n])


def superpose(trace: Trace, times: float, seed: int = 0) -> Trace:
    """`times` the load, for times >= 1: copies laid over the trace; the last one is thinned.

    Each copy's sessions, whole, are moved round the trace by one random offset, which keeps the
    shape of bursts. Contents of a copy are its own: reuse is as in the trace within a copy and none
    between copies, so the reuse of real traffic at this rate is at least this.
    """
    if not 1 <= times < float("inf"):
        raise ConfigError(f"superpose needs times of at least 1, got {times}; thin lowers the load")
    rng, requests = Random(f"superpose {seed}"), list(trace)
    ids = {block for one in trace for block in one.blocks}
    stride = max(ids, default=0) - min(ids, default=0) + 1
    for copy in range(1, math.ceil(times)):
        share = min(1.0, times - copy)
        source = thin(trace, share, rng.randrange(1 << 30)) if share < 1 else trace
        requests += _copy(source, copy, stride, rng.random() * trace.span, trace.span)
    requests.sort(key=lambda one: one.at)
    return trace.changed(f"superpose({times:g}, seed={seed})", tuple(requests))


def _copy(
    trace: Trace, copy: int, stride: int, offset: float, span: float
) -> Iterator[TraceRequest]:
    moved: dict[str, float] = {}
    for one in trace:
        turned = (one.at + offset) % span if span else 0.0
        move = moved.setdefault(one.session or one.id, turned - one.at)
        yield replace(
            one,
            id=f"{one.id}+{copy}",
            at=one.at + move,
            blocks=tuple(block + copy * stride for block in one.blocks),
            session=one.session and f"{one.session}+{copy}",
            parent=one.parent and f"{one.parent}+{copy}",
        )


def window(trace: Trace, start: float, end: float) -> Trace:
    """Arrivals in [start, end) seconds, from 0 on; turns whose parent came earlier lose it."""
    if not 0 <= start < end:
        raise ConfigError(f"a window needs 0 <= start < end, got {start} and {end}")
    inside = [one for one in trace if start <= one.at < end]
    return trace.changed(
        f"window({start:g}, {end:g})",
        _without_strays(replace(one, at=one.at - start) for one in inside),
    )


def truncate(trace: Trace, max_len: int) -> Trace:
    """Prompt and answer together at most `max_len` tokens: ends of prompts go first, then answers.

    An answer keeps at least half of `max_len` where it is that long; a prompt at least 1 token.
    """
    if max_len < 2:
        raise ConfigError(f"max_len must be at least 2, got {max_len}")
    requests = []
    for one in trace:
        n_out = min(one.n_out, max(max_len // 2, max_len - one.n_in))
        n_in = min(one.n_in, max_len - n_out)
        blocks = one.blocks[: -(-n_in // trace.block_size)]
        requests.append(replace(one, n_in=n_in, n_out=n_out, blocks=blocks))
    return trace.changed(f"truncate({max_len})", tuple(requests))


def split_blocks(trace: Trace, block_size: int) -> Trace:
    """Blocks of `block_size` instead of larger ones: block b becomes b * parts + j.

    Sharing stays as coarse as it was recorded: two prompts that differ in one token of a large
    block share none of its parts, though they might in truth.
    """
    parts, rest = divmod(trace.block_size, max(1, block_size))
    if block_size < 1 or rest or not parts:
        raise ConfigError(
            f"blocks of {trace.block_size} tokens cannot be split into blocks of {block_size}; "
            f"give a divisor of {trace.block_size}"
        )
    requests = []
    for one in trace:
        fine = tuple(block * parts + j for block in one.blocks for j in range(parts))
        requests.append(replace(one, blocks=fine[: -(-one.n_in // block_size)]))
    changed = trace.changed(f"split_blocks({block_size})", tuple(requests))
    return replace(changed, block_size=block_size)


def with_arrivals(trace: Trace, process: str, seed: int = 0, **options: Any) -> Trace:
    """Sessions start by a process of `arrivals.PROCESSES`, in their order; gaps in them stay.

    For files without times, and to ask what burstiness alone does.
    """
    times = arrivals.by_name(process, Random(f"arrivals {seed}"), **options)
    moves: dict[str, float] = {}
    requests = []
    for one in trace:
        key = one.session or one.id
        if key not in moves:
            moves[key] = next(times) - one.at
        requests.append(replace(one, at=one.at + moves[key]))
    requests.sort(key=lambda one: one.at)
    listed = "".join(f", {name}={value}" for name, value in options.items())
    return trace.changed(f"with_arrivals({process}{listed}, seed={seed})", tuple(requests))


def _without_strays(requests: Iterable[TraceRequest]) -> tuple[TraceRequest, ...]:
    """The same, but parents that are not among them are forgotten."""
    kept = list(requests)
    ids = {one.id for one in kept}
    return tuple(one if one.parent in ids else replace(one, parent=None) for one in kept)


def link_sessions(trace: Trace) -> Trace:
    """Conversations where a trace names none: a request follows the latest whose prefix it extends.

    Only whole blocks count: a prompt's last block is rarely whole, so it is left out of the prefix.
    """
    latest: dict[int, TraceRequest] = {}
    sessions: dict[str, tuple[str, int]] = {}
    requests = []
    for one in trace:
        whole = one.blocks[: one.n_in // trace.block_size]
        parent = next((latest[b] for b in reversed(whole) if b in latest), None)
        if parent is None:
            sessions[one.id] = (one.id, 0)
        else:
            session, turn = sessions[parent.id]
            sessions[one.id] = (session, turn + 1)
        session, turn = sessions[one.id]
        parent_id = None if parent is None else parent.id
        requests.append(replace(one, session=session, turn=turn, parent=parent_id))
        if whole and len(whole) > 1:  # a single block is a system prompt, not a conversation
            latest[whole[-1]] = one
    return trace.changed("link_sessions", tuple(requests))


def attach_prefixes(
    trace: Trace, share: float, prompts: int, seed: int = 0, tokens: int = 1024
) -> Trace:
    """A stand-in for contents that a trace lacks: system prompts, used by Zipf's law (exponent 1).

    A `share` of the requests starts with one of `prompts` prefixes of `tokens` tokens, which come
    on top of their own lengths. Ours, not measured: say so where results are shown.
    """
    if not 0 <= share <= 1 or prompts < 1 or tokens < 1:
        raise ConfigError(
            f"share must be in [0, 1], prompts and tokens at least 1; got {share}, {prompts} and "
            f"{tokens}"
        )
    if any(one.blocks for one in trace):
        raise ConfigError(f"trace {trace.name} knows its contents; prefixes would replace them")
    rng, size = Random(f"prefixes {seed}"), trace.block_size
    weights = [1 / (rank + 1) for rank in range(prompts)]
    per_prompt = -(-tokens // size)
    requests = []
    for one in trace:
        if rng.random() >= share:
            requests.append(one)
            continue
        which = rng.choices(range(prompts), weights)[0]
        blocks = tuple(-1 - (which * per_prompt + j) for j in range(per_prompt))
        requests.append(replace(one, n_in=one.n_in + per_prompt * size, blocks=blocks))
    step = f"attach_prefixes({share:g}, {prompts}, seed={seed}, tokens={tokens})"
    return trace.changed(step, tuple(requests))
