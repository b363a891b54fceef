"""What `kvarn sim` sends: traces of files, generators and data sets, as requests of the engine."""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from random import Random
from typing import Any

from kvarn.bench.arrivals import arrival_times
from kvarn.bench.options import Traffic, Workload
from kvarn.bench.prompts import make_jobs
from kvarn.core.errors import ConfigError, nearest
from kvarn.core.request import Request, SamplingParams
from kvarn.workload.generate import GENERATORS, by_name
from kvarn.workload.load import open_trace
from kvarn.workload.tokens import block_tokens
from kvarn.workload.trace import Trace, TraceRequest
from kvarn.workload.transform import limit, time_warp


def find_trace(work: Workload, traffic: Traffic) -> Trace:
    """The requests: a file's, or a data set's with arrivals at the given rate."""
    if traffic.trace is not None:
        if traffic.trace.startswith("synthetic-"):
            trace = generated(traffic.trace, work, traffic)
        else:
            trace = open_trace(traffic.trace, skip_bad=traffic.skip_bad)
        if work.speed != 1.0:
            trace = time_warp(trace, work.speed)
        return limit(trace, traffic.limit) if traffic.limit else trace
    jobs = make_jobs(work)
    rate = traffic.request_rate
    times = arrival_times(len(jobs), rate, traffic.burstiness, Random(f"arrivals {work.seed}"))
    requests = []
    for i, (job, at) in enumerate(zip(jobs, times, strict=True)):
        turn = job.turns[0]
        if len(job.turns) > 1 or isinstance(turn.prompt, str):
            raise ConfigError(
                f"data set {work.dataset!r} has turns or texts, which a simulation cannot "
                f"tokenise; give a trace file, or data set random or shared-prefix"
            )
        requests.append(
            TraceRequest(str(i), at, len(turn.prompt), turn.n_output, tuple(turn.prompt))
        )
    return Trace(f"synthetic-{work.dataset}", tuple(requests), 1)


def generated(name: str, work: Workload, traffic: Traffic) -> Trace:
    """`num_prompts` requests of a generator, at the given rate if it is finite.

    Sessions and groups stay whole: as many as give `num_prompts` requests by their mean size. The
    rate of sessions is in sessions per second.
    """
    if name not in GENERATORS:
        raise ConfigError(f"unknown generator {name!r}{nearest(name, GENERATORS)}")
    known = inspect.signature(GENERATORS[name]).parameters
    size = next(option for option in ("n", "sessions", "groups") if option in known)
    each = [known[one].default for one in ("turns", "steps", "per_group") if one in known]
    wanted = math.ceil(work.num_prompts / each[0]) if each else work.num_prompts
    options: dict[str, Any] = {size: wanted, "seed": work.seed}
    if math.isfinite(traffic.request_rate):
        options["rate"] = traffic.request_rate
    return by_name(name, **options)


def sessions_of(traffic: Traffic) -> bool:
    """Whether the rate counts sessions: the generator makes whole conversations."""
    make = GENERATORS.get(traffic.trace or "")
    return make is not None and "sessions" in inspect.signature(make).parameters


def requests_of(trace: Trace, only: Iterable[TraceRequest] | None = None) -> Iterator[Request]:
    """Requests of the engine, one at a time: a long trace's prompts never lie in memory at once."""
    first = trace.requests[0].at if trace.requests else 0.0
    for one in trace if only is None else only:
        yield request_of(one, trace.block_size, one.at - first)


def request_of(one: TraceRequest, block_size: int, arrival: float) -> Request:
    """A request of the engine that arrives at `arrival` [s]."""
    params = _params(max(1, one.n_out))
    prompt = block_tokens(one, block_size)
    return Request(one.id, prompt, params, arrival=arrival, session=one.session)


@lru_cache(1 << 12)
def _params(max_tokens: int) -> SamplingParams:
    """Greedy, to the full length; requests share them."""
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)


class ClosedLoop:
    """A turn comes when the answer before it has ended and the time to think is over.

    Its recorded arrival is not used. What follows a refused request never comes. A request whose
    parent is not in the trace comes at its recorded time.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        known = {one.id for one in trace}
        self._first = [one for one in trace if one.parent not in known]
        self._next: dict[str, list[TraceRequest]] = defaultdict(list)
        for one in trace:
            if one.parent in known:
                self._next[str(one.parent)].append(one)

    def first(self) -> Iterator[Request]:
        """Requests that wait for no other."""
        return requests_of(self.trace, self._first)

    def after(self, name: str, now: float) -> list[Request]:
        """Turns that the end of request `name` at `now` [s] brings."""
        size = self.trace.block_size
        return [request_of(one, size, now + one.think) for one in self._next.pop(name, ())]
