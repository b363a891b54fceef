"""`kvarn bench serve`: an open-loop load generator of several processes against a running server.

Open loop: requests are sent when they are due, whatever the server does; `max_concurrency` bounds
those in flight (with a rate of infinity that is a closed loop). Requests that fail are counted as
failed and their errors are kept.
"""

import asyncio
import math
import multiprocessing
import multiprocessing.connection
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection as Pipe
from random import Random
from typing import Any

from kvarn.bench import metrics, record
from kvarn.bench.arrivals import arrival_times
from kvarn.bench.backends import Asking, find_backend
from kvarn.bench.checks import check_percentiles
from kvarn.bench.client import Sample, Share, ask, work
from kvarn.bench.http import Client, HTTPError
from kvarn.bench.options import Load, Workload
from kvarn.bench.prompts import Job, Turn, make_jobs
from kvarn.core.errors import ConfigError, KvarnError

#: from the moment at which all processes are ready to the run's start [s]
LEAD = 0.3


def run(
    work_: Workload, load: Load, watch: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Run a load and return the result; `watch(done, total)` is called while it runs."""
    _check(load)
    goodput = metrics.parse_goodput(load.goodput)
    headers = _headers(load)
    jobs = make_jobs(work_)
    model = asyncio.run(_prepare(load, headers, jobs))
    asking = Asking(model, load.temperature, load.ignore_eos)
    shares = _shares(load, asking, headers, _timed(jobs, work_, load))
    samples, duration = _run_shares(shares, sum(len(job.turns) for job in jobs), watch)
    percentiles = load.percentiles
    found = metrics.whole_run(samples, duration, percentiles, goodput)
    result = record.header("serve", _workload(work_, load), _public(load))
    result |= {
        "backend": load.backend,
        "endpoint_type": load.backend,
        "label": load.label,
        "model_id": model,
        "tokenizer_id": None,
        "num_prompts": work_.num_prompts,
        "request_rate": _json_rate(load.request_rate),
        "burstiness": _json_rate(load.burstiness),
        "max_concurrency": load.max_concurrency,
        **found,
        "steady": metrics.steady_window(samples, duration, percentiles),
        "error_counts": dict(Counter(s.error for s in samples if not s.ok).most_common(20)),
    }
    if load.detailed:
        result |= metrics.detailed(samples)
    return result


def _check(load: Load) -> None:
    find_backend(load.backend)
    for name, least in (("processes", 1), ("warmups", 0), ("max_concurrency", 1)):
        value = getattr(load, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
    check_percentiles(load.percentiles)
    if not load.timeout > 0:
        raise ConfigError(f"timeout must be above 0, got {load.timeout}")


def _headers(load: Load) -> dict[str, str]:
    headers = {}
    for pair in load.header:
        name, found, value = pair.partition("=")
        if not found:
            raise ConfigError(f"header {pair!r} must be NAME=VALUE")
        headers[name.strip()] = value.strip()
    if load.api_key:
        headers["Authorization"] = f"Bearer {load.api_key}"
    return headers


def _public(load: Load) -> dict[str, Any]:
    """The options as a result keeps them: no secrets, no infinities."""
    names = tuple(pair.partition("=")[0] for pair in load.header)
    return asdict(load) | {
        "api_key": None,
        "header": names,
        "request_rate": _json_rate(load.request_rate),
        "burstiness": _json_rate(load.burstiness),
    }


def _json_rate(value: float) -> float | str:
    return "inf" if math.isinf(value) else value


def _workload(work_: Workload, load: Load) -> dict[str, Any]:
    """What must agree for two results to be comparable."""
    names = ("max_concurrency", "temperature", "ignore_eos", "backend")
    traffic = {name: getattr(load, name) for name in names}
    traffic["request_rate"] = _json_rate(load.request_rate)
    traffic["burstiness"] = _json_rate(load.burstiness)
    return asdict(work_) | traffic


async def _prepare(load: Load, headers: dict[str, str], jobs: Sequence[Job]) -> str:
    """Find the model's name and send the warm-up requests; a server that fails them is an error."""
    client = Client(load.base_url, headers)
    model = load.model
    try:
        if model is None and load.backend != "sglang":
            model = (await client.get("/v1/models"))["data"][0]["id"]
    except (OSError, HTTPError, LookupError, ValueError, TypeError) as error:
        raise KvarnError(f"no model list from {load.base_url}: {error}") from None
    asking = Asking(model or "default", load.temperature, load.ignore_eos)
    share = Share(load.base_url, load.backend, asking, headers, [], None, load.timeout)
    turn = jobs[0].turns[0]
    other = Turn(turn.prompt[::-1], turn.n_output)  # so that it warms no prefix cache
    for _ in range(load.warmups):
        sample = Sample(0)
        await ask(client, share, other, [], sample, time.monotonic())
        if not sample.ok:
            raise KvarnError(f"the warm-up request to {load.base_url} failed: {sample.error}")
    client.close()
    return asking.model


def _timed(jobs: Sequence[Job], work_: Workload, load: Load) -> list[tuple[int, float, Job]]:
    """(index of the first request, due time, job); a trace's own times give way to a set rate."""
    own = [job.at for job in jobs]
    times: list[float]
    if math.isinf(load.request_rate) and all(at is not None for at in own):
        times = [at or 0.0 for at in own]
    else:
        rng = Random(f"arrivals {work_.seed}")
        times = arrival_times(len(jobs), load.request_rate, load.burstiness, rng)
    timed, first = [], 0
    for job, due in zip(jobs, times, strict=True):
        timed.append((first, due, job))
        first += len(job.turns)
    return timed


def _shares(
    load: Load, asking: Asking, headers: dict[str, str], timed: list[tuple[int, float, Job]]
) -> list[Share]:
    """Deal the jobs out to processes in turn, and the concurrency evenly."""
    n = min(load.processes, len(timed), load.max_concurrency or load.processes)
    limits: list[int | None] = [None] * n
    if load.max_concurrency is not None:
        each, more = divmod(load.max_concurrency, n)
        limits = [each + (i < more) for i in range(n)]
    return [
        Share(load.base_url, load.backend, asking, headers, timed[i::n], limits[i], load.timeout)
        for i in range(n)
    ]


def _run_shares(
    shares: Sequence[Share], total: int, watch: Callable[[int, int], None] | None
) -> tuple[list[Sample], float]:
    """Run each share in a process; returns the samples in order and the run's duration [s]."""
    context = multiprocessing.get_context("spawn")
    progress = context.Value("q", 0)
    started: list[tuple[Pipe, Any]] = []
    try:
        for share in shares:
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, share, progress), daemon=True)
            process.start()
            there.close()
            started.append((here, process))
        for pipe, _ in started:
            _receive(pipe)
        zero = time.monotonic() + LEAD
        for pipe, _ in started:
            pipe.send(zero)
        waiting, samples = [pipe for pipe, _ in started], list[Sample]()
        while waiting:
            if watch is not None:
                watch(progress.value, total)
            ready = multiprocessing.connection.wait(waiting, timeout=0.1)
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                samples += _receive(pipe)
                waiting.remove(pipe)
    finally:
        for pipe, process in started:
            pipe.close()
            process.join(1.0)
            if process.is_alive():
                process.terminate()
    if watch is not None:
        watch(total, total)
    ends = [s.start + s.latency for s in samples if s.ok] or [time.monotonic() - zero]
    return sorted(samples, key=lambda sample: sample.index), max(ends)


def _receive(pipe: Pipe) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise KvarnError("a client process of the load generator ended early") from None
