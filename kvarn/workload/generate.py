"""Synthetic traces of one request a session, and `by_name` for all generators.

Every trace is called `synthetic-...` and carries its options and seed in `chain`. Lengths are
log-normal by mean and coefficient of variation; arrivals are gamma renewals by rate and `cv`.
Equal options give equal traces on every machine.
"""

import inspect
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from kvarn.core.errors import ConfigError, nearest
from kvarn.workload import arrivals
from kvarn.workload.chains import Chains, Piece, length
from kvarn.workload.lengths import Zipf, lognormal
from kvarn.workload.sessions import agents, multi_turn
from kvarn.workload.trace import Trace, TraceRequest


def independent(
    n: int = 1000, rate: float = 1.0, cv: float = 1.0, n_in: float = 1000, in_cv: float = 1.0,
    n_out: float = 200, out_cv: float = 1.0, seed: int = 0,
) -> Trace:  # fmt: skip
    """Requests that share nothing; their contents are unknown, so unlike all others."""
    rng = Random(f"poisson {seed}")
    ins, outs = lognormal(n_in, in_cv), lognormal(n_out, out_cv)
    requests = [
        TraceRequest(str(i), at, ins.sample(rng), outs.sample(rng))
        for i, at in zip(range(n), arrivals.gamma(rng, rate, cv))
    ]
    return Trace("synthetic-poisson", tuple(requests))


def shared_prefix(
    n: int = 1000, rate: float = 1.0, cv: float = 1.0, prompts: int = 16, depth: int = 1,
    branches: int = 4, exponent: float = 1.0, prefix: float = 1024, n_in: float = 256,
    in_cv: float = 1.0, n_out: float = 200, out_cv: float = 1.0, block_size: int = 16,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """A tree of prefixes: one of `prompts` roots, then one of `branches` children at each level.

    Every level adds `prefix` tokens; choices follow Zipf's law. Own content of mean `n_in` follows.
    """
    _whole(prompts=prompts, depth=depth, branches=branches, prefix=prefix)
    rng = Random(f"shared-prefix {seed}")
    roots, children = Zipf(prompts, exponent), Zipf(branches, exponent)
    ins, outs = lognormal(n_in, in_cv), lognormal(n_out, out_cv)

    def pieces(i: int) -> list[Piece]:
        path = (roots.sample(rng), *(children.sample(rng) for _ in range(depth - 1)))
        nodes = [path[: level + 1] for level in range(depth)]
        return [*((node, int(prefix)) for node in nodes), (("own", i), ins.sample(rng))]

    times = arrivals.gamma(rng, rate, cv)
    requests = _single(n, times, pieces, lambda: outs.sample(rng), block_size)
    return Trace("synthetic-shared-prefix", requests, block_size)


def rag(
    n: int = 1000, rate: float = 1.0, cv: float = 1.0, chunks: int = 10_000, k: int = 5,
    exponent: float = 1.0, chunk: int = 512, prefix: int = 256, n_in: float = 64,
    in_cv: float = 1.0, n_out: float = 200, out_cv: float = 1.0, block_size: int = 16,
    seed: int = 0,
) -> Trace:  # fmt: skip
    """A system prompt, `k` distinct chunks of `chunks` by Zipf's law, then a question.

    Prefix caching finds only equal sequences of chunks from the start: order counts.
    """
    _whole(chunks=chunks, k=k, chunk=chunk)
    if k > chunks or prefix < 0:
        raise ConfigError(
            f"a request takes {k} distinct chunks of {chunks} after {prefix} tokens; k must be at "
            f"most chunks, prefix at least 0"
        )
    rng = Random(f"rag {seed}")
    law = Zipf(chunks, exponent)
    ins, outs = lognormal(n_in, in_cv), lognormal(n_out, out_cv)

    def pieces(i: int) -> list[Piece]:
        body: list[Piece] = [(("chunk", one), chunk) for one in law.distinct(k, rng)]
        return [("system", prefix), *body, (("own", i), ins.sample(rng))]

    times = arrivals.gamma(rng, rate, cv)
    requests = _single(n, times, pieces, lambda: outs.sample(rng), block_size)
    return Trace("synthetic-rag", requests, block_size)


def offline_groups(
    groups: int = 20, per_group: int = 10, document: float = 8000, document_cv: float = 0.5,
    n_in: float = 64, in_cv: float = 1.0, n_out: float = 200, out_cv: float = 1.0,
    shuffled: bool = False, block_size: int = 16, seed: int = 0,
) -> Trace:  # fmt: skip
    """A batch, all at time 0: `per_group` questions about each of `groups` documents.

    In order of the groups, or `shuffled`: what a scheduler that reorders could regain.
    """
    _whole(groups=groups, per_group=per_group)
    rng = Random(f"offline-groups {seed}")
    texts = lognormal(document, document_cv)
    ins, outs = lognormal(n_in, in_cv), lognormal(n_out, out_cv)
    sizes = [texts.sample(rng) for _ in range(groups)]
    order = [group for group in range(groups) for _ in range(per_group)]
    if shuffled:
        rng.shuffle(order)

    def pieces(i: int) -> list[Piece]:
        return [(("document", order[i]), sizes[order[i]]), (("own", i), ins.sample(rng))]

    times = arrivals.all_at_once(rng)
    requests = _single(len(order), times, pieces, lambda: outs.sample(rng), block_size)
    return Trace("synthetic-offline-groups", requests, block_size)


GENERATORS: dict[str, Callable[..., Trace]] = {
    "synthetic-poisson": independent,
    "synthetic-shared-prefix": shared_prefix,
    "synthetic-multi-turn": multi_turn,
    "synthetic-agents": agents,
    "synthetic-rag": rag,
    "synthetic-offline-groups": offline_groups,
}


def by_name(name: str, **options: Any) -> Trace:
    """A trace of a generator of `GENERATORS` (`synthetic-` may be left out), by its options.

    Options that are not given take the generator's defaults; `chain` records all of them.
    """
    full = name if name.startswith("synthetic-") else f"synthetic-{name}"
    if full not in GENERATORS:
        raise ConfigError(f"unknown generator {name!r}{nearest(full, GENERATORS)}")
    make = GENERATORS[full]
    known = inspect.signature(make).parameters
    for option, value in options.items():
        if option not in known:
            raise ConfigError(f"{full} has no option {option!r}{nearest(option, known)}")
        kind = known[option].annotation
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise ConfigError(f"{full}: {option} is {value!r}; it must be of type {kind.__name__}")
    used = {key: parameter.default for key, parameter in known.items()} | options
    if used.get("n", 1) < 1:
        raise ConfigError(f"{full}: n must be at least 1, got {used['n']}")
    trace = make(**used)
    listed = ", ".join(f"{key}={value}" for key, value in used.items())
    return trace.changed(f"generate({listed})", trace.requests)


def _single(
    n: int, times: Iterator[float], pieces: Callable[[int], list[Piece]],
    answer: Callable[[], int], block_size: int,
) -> tuple[TraceRequest, ...]:  # fmt: skip
    chains, requests = Chains(block_size), []
    for i, at in zip(range(n), times):
        prompt = pieces(i)
        blocks = chains.blocks(prompt)
        requests.append(TraceRequest(str(i), at, length(prompt), answer(), blocks))
    return tuple(requests)


def _whole(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
