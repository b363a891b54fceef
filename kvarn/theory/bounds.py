"""Bounds on a whole run, from lengths and the fastest numbers of the machine alone.

Nothing here knows a policy, so each bound holds for all of them, with batching, chunked prefill,
preemption, prefix sharing and any routing. They assume exact attention (every answer token attends
to its whole context in memory), one token per request and step (no speculation), that every
request ends with all its tokens, and that equal `blocks` are all that requests can share (a prompt
does not reuse the KV of an earlier answer).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvarn.core.errors import ConfigError
from kvarn.theory.cache import belady_hits, unlimited_hits
from kvarn.theory.volume import srpt_flow


class Load(Protocol):
    """A request as lengths and content; `TraceRequest` is one."""

    @property
    def at(self) -> float:
        """Arrival [s]."""

    @property
    def n_in(self) -> int:
        """Prompt [tokens]."""

    @property
    def n_out(self) -> int:
        """Answer [tokens]."""

    @property
    def blocks(self) -> tuple[int, ...]:
        """Chained content ids of the prompt; () if unknown."""


@dataclass(slots=True, frozen=True)
class _Work:
    """The least that one request needs of each resource."""

    at: float
    run: float  #: steps of its answer [s]
    prefill: int  #: prompt tokens that no other request can have computed, at least one
    tokens: int  #: computed for it alone
    volume: float  #: KV that it alone holds while its answer is made [token s]


def lower_bounds(
    requests: Sequence[Load],
    *,
    kv_tokens: int,
    seconds_per_round: float,
    peak_tokens_per_s: float,
    max_seqs: int | None = None,
    block_size: int = 512,
    shared: bool = True,
) -> dict[str, float]:
    """What no policy can beat on `requests`; names as in docs/theory.md.

    All resources are those of the whole fleet: `kv_tokens` positions of KV, `max_seqs` places in
    its batches (None: no limit), `peak_tokens_per_s` computed by all instances together at the
    best batch. `seconds_per_round` is the shortest step there is, with one sequence and no
    context. `block_size` is that of the requests' `blocks`. `shared` says whether equal prefixes
    may share KV; without, every prompt counts in full and the hit rate is 0.

    Keys: `mean_e2e`, `mean_ttft`, `makespan` [s, lower bounds]; `output_tokens_per_s`,
    `requests_per_s` over the run and `stable_requests_per_s` for endless load [upper bounds];
    `hit_rate_unlimited` (any order of service), `hit_rate` (the one exception: for service in
    order of arrival, the fleet's memory as one cache) [upper bounds].
    """
    _check(requests, kv_tokens, seconds_per_round, peak_tokens_per_s, max_seqs)
    ordered = sorted(requests, key=lambda r: r.at)
    sizes = _block_tokens(ordered, block_size) if shared else {}
    work = _least_work(ordered, sizes, seconds_per_round)
    n = len(work)
    resources: list[tuple[list[tuple[float, float]], float]] = [
        ([(w.at, w.volume) for w in work], float(kv_tokens)),
        ([(w.at, w.tokens) for w in work], peak_tokens_per_s),
    ]
    if max_seqs is not None:
        resources.append(([(w.at, w.run) for w in work], float(max_seqs)))
    prefill = srpt_flow([(w.at, w.prefill) for w in work], peak_tokens_per_s) / n
    ttft = max(seconds_per_round, prefill)
    decode = sum(r.n_out - 1 for r in ordered) * seconds_per_round / n
    e2e = max(ttft + decode, *(srpt_flow(load, speed) / n for load, speed in resources))
    makespan = max(
        max(w.at + w.run for w in work) - work[0].at,
        *(_span(load, speed) for load, speed in resources),
        _distinct_tokens(ordered, sizes) / peak_tokens_per_s,
    )
    rates = [speed * n / total for load, speed in resources if (total := sum(v for _, v in load))]
    bounds = {
        "mean_e2e": e2e,
        "mean_ttft": ttft,
        "makespan": makespan,
        "output_tokens_per_s": sum(r.n_out for r in ordered) / makespan,
        "requests_per_s": n / makespan,
        "stable_requests_per_s": min(rates),
    }
    return bounds | _hit_rates(ordered, sizes, kv_tokens, block_size)


def _check(
    requests: Sequence[Load],
    kv_tokens: int,
    seconds_per_round: float,
    peak_tokens_per_s: float,
    max_seqs: int | None,
) -> None:
    """Refuses what no machine is; the message names the argument."""
    if not requests:
        raise ConfigError("bounds of an empty run: give at least one request")
    numbers = {
        "kv_tokens": kv_tokens,
        "seconds_per_round": seconds_per_round,
        "peak_tokens_per_s": peak_tokens_per_s,
        "max_seqs": 1 if max_seqs is None else max_seqs,
    }
    for name, value in numbers.items():
        if value <= 0:
            raise ConfigError(f"{name} is {value}; give a number above 0")
    for i, request in enumerate(requests):
        if request.n_in < 1 or request.n_out < 1:
            raise ConfigError(
                f"request {i} has {request.n_in} prompt and {request.n_out} answer tokens; "
                "bounds need at least one of each"
            )


def _block_tokens(requests: Sequence[Load], block_size: int) -> dict[int, int]:
    """Tokens of every block id: `block_size`, or less for the last of a prompt.

    Where an id closes prompts of different lengths the longest counts, which only adds hits.
    """
    tokens: dict[int, int] = {}
    for request in requests:
        left = request.n_in
        for block in request.blocks:
            tokens[block] = max(tokens.get(block, 0), min(block_size, left))
            left -= block_size
    return {block: n for block, n in tokens.items() if n > 0}


def _least_work(
    requests: Sequence[Load], sizes: dict[int, int], seconds_per_round: float
) -> list[_Work]:
    """What each request needs alone, taking every block that another one reads for a gift.

    The last prompt token is always computed, for its logits; the last answer token never is. The
    k-th answer token needs prompt + k - 1 positions in memory for one step.
    """
    readers = Counter(block for request in requests for block in request.blocks)
    work = []
    for request in requests:
        common = sum(sizes[b] for b in request.blocks if b in sizes and readers[b] > 1)
        own, n_out = max(0, request.n_in - common), request.n_out
        volume = (own * n_out + n_out * (n_out - 1) / 2) * seconds_per_round
        prefill = max(1, own)
        run = n_out * seconds_per_round
        work.append(_Work(request.at, run, prefill, prefill + n_out - 1, volume))
    return work


def _distinct_tokens(requests: Sequence[Load], sizes: dict[int, int]) -> int:
    """Tokens computed at least once: answers but their last tokens, blocks once, the rest."""
    known = sum(sizes[b] for r in requests for b in r.blocks if b in sizes)
    rest = max(0, sum(r.n_in for r in requests) - known)
    return sum(r.n_out - 1 for r in requests) + sum(sizes.values()) + rest


def _span(load: Sequence[tuple[float, float]], speed: float) -> float:
    """Least time from the first arrival to the end of all work, whatever the order."""
    now = load[0][0]
    for at, volume in load:
        now = max(now, at) + volume / speed
    return now - load[0][0]


def _hit_rates(
    requests: Sequence[Load], sizes: dict[int, int], kv_tokens: int, block_size: int
) -> dict[str, float]:
    """The two bounds on the share of prompt tokens that come from the prefix cache."""
    total = sum(request.n_in for request in requests)
    chains = [[b for b in request.blocks if b in sizes] for request in requests]
    every = unlimited_hits(chains, block_size=block_size, sizes=sizes)
    best = belady_hits(chains, kv_tokens, block_size=block_size, sizes=sizes)
    return {
        "hit_rate_unlimited": min(1.0, every.hit / total),
        "hit_rate": min(1.0, best.hit / total),
    }
