"""Stretching, thinning and cutting traces. Each step is recorded in the trace's `chain`."""

from dataclasses import replace
from random import Random

from kvarn.core.errors import ConfigError
from kvarn.workload.trace import Trace, TraceRequest


def time_warp(trace: Trace, speed: float) -> Trace:
    """Arrivals `speed` times as fast: order and correlation stay, bursts get sharper."""
    if not speed > 0:
        raise ConfigError(f"speed must be above 0, got {speed}")
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
        raise ConfigError("share must be in [0, 1], prompts and tokens at least 1")
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
