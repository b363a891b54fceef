"""From samples to numbers, under the definitions and key names of `vllm bench serve`.

TTFT: sent to the first event with tokens. ITL: between events with tokens, all requests together.
E2EL: sent to the last event with tokens. TPOT: (E2EL - TTFT) / (output tokens - 1), of requests
with at least two. Goodput: requests a second that met every target (TPOT is 0 for one token).
Throughputs are over the whole run, from its start to the last answer.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from kvarn.bench.client import Sample
from kvarn.bench.stats import summary
from kvarn.core.errors import ConfigError, nearest

TARGETS = ("ttft", "tpot", "e2el")
MIN_STEADY = 0.1  #: a window below this share of the run says nothing


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """Targets in milliseconds from words such as 'ttft:200'."""
    targets = {}
    for pair in " ".join(pairs).replace(",", " ").split():
        name, _, value = pair.partition(":")
        if name not in TARGETS:
            raise ConfigError(f"unknown goodput target {name!r}{nearest(name, TARGETS)}")
        try:
            targets[name] = float(value)
        except ValueError:
            raise ConfigError(f"goodput target {pair!r} must be NAME:MILLISECONDS") from None
    return targets


def tpot(sample: Sample) -> float:
    """Mean time of an output token after the first; 0 for a single token. [seconds]"""
    if sample.n_output < 2:
        return 0.0
    return (sample.latency - sample.ttft) / (sample.n_output - 1)


def whole_run(
    samples: Sequence[Sample],
    duration: float,
    percentiles: Sequence[float],
    goodput: dict[str, float],
) -> dict[str, Any]:
    """The numbers of a run of `duration` seconds."""
    good = [sample for sample in samples if sample.ok]
    n_input = sum(sample.n_prompt for sample in good)
    n_output = sum(sample.n_output for sample in good)
    met = sum(meets(sample, goodput) for sample in good)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(samples) - len(good),
        "total_input_tokens": n_input,
        "total_output_tokens": n_output,
        "request_throughput": len(good) / duration,
        "request_goodput": met / duration if goodput else None,
        "output_throughput": n_output / duration,
        "total_token_throughput": (n_input + n_output) / duration,
        "max_output_tokens_per_s": _peak_second(good),
        "max_concurrent_requests": _peak_concurrency(good),
    }
    cached = [sample.n_cached for sample in good if sample.n_cached is not None]
    found["total_cached_tokens"] = sum(cached) if cached else None
    found |= latencies(good, percentiles)
    found |= summary("client_queue_time", [sample.queued for sample in good], percentiles)
    return found


def latencies(good: Sequence[Sample], percentiles: Sequence[float]) -> dict[str, float]:
    """The four latency measures of answered requests."""
    return {
        **summary("ttft", [sample.ttft for sample in good], percentiles),
        **summary("tpot", [tpot(s) for s in good if s.n_output > 1], percentiles),
        **summary("itl", [gap for sample in good for gap in sample.itl], percentiles),
        **summary("e2el", [sample.latency for sample in good], percentiles),
    }


def detailed(samples: Sequence[Sample]) -> dict[str, Any]:
    """One entry a request, in order, under the names that `vllm bench serve` uses."""
    return {
        "input_lens": [sample.n_prompt for sample in samples],
        "output_lens": [sample.n_output if sample.ok else 0 for sample in samples],
        "start_times": [sample.start for sample in samples],
        "queue_times": [sample.queued for sample in samples],
        "ttfts": [sample.ttft for sample in samples],
        "itls": [sample.itl for sample in samples],
        "latencies": [sample.latency for sample in samples],
        "generated_texts": [sample.text for sample in samples],
        "errors": [sample.error for sample in samples],
    }


def steady_window(
    samples: Sequence[Sample], duration: float, percentiles: Sequence[float]
) -> dict[str, Any]:
    """The same numbers while the load stood: neither ramping up nor draining.

    The window runs from the first completed request to the last one sent. Tokens and completions
    count by when they happened, TTFT by the first token's time, ITL by each token's. It is empty
    (with the reason) when it would be under a tenth of the run, as when all are sent at once.
    """
    definition = "from the first completed request to the last request sent"
    good = [sample for sample in samples if sample.ok]
    begin = min((s.start + s.latency for s in good), default=0.0)
    end = max((s.start for s in samples), default=0.0)
    if not good or end - begin < MIN_STEADY * duration:
        why = "the run has no such window: send more requests than the server takes at once"
        return {"definition": definition, "start": None, "end": None, "why_empty": why}
    width = end - begin
    inside = [s for s in good if begin <= s.start + s.ttft < end]
    ended = [s for s in good if begin < s.start + s.latency <= end]
    events = [pair for s in good for pair in _events(s) if begin <= pair[0] < end]
    gaps = [
        gap
        for s in good
        for (at, _), gap in zip(_events(s)[1:], s.itl, strict=True)
        if begin <= at < end
    ]
    return {
        "definition": definition,
        "start": begin,
        "end": end,
        "completed": len(ended),
        "request_throughput": len(ended) / width,
        "output_throughput": sum(n for _, n in events) / width,
        **summary("ttft", [s.ttft for s in inside], percentiles),
        **summary("tpot", [tpot(s) for s in ended if s.n_output > 1], percentiles),
        **summary("itl", gaps, percentiles),
        **summary("e2el", [s.latency for s in ended], percentiles),
    }


def meets(sample: Sample, goodput: dict[str, float]) -> bool:
    """Whether an answered request met every target [ms]."""
    seen = {"ttft": sample.ttft, "tpot": tpot(sample), "e2el": sample.latency}
    return all(seen[name] * 1000 <= most for name, most in goodput.items())


def _events(sample: Sample) -> list[tuple[float, float]]:
    """(time, tokens) of each event; an event's tokens are the answer's, shared out evenly."""
    times = list(accumulate(sample.itl, initial=sample.start + sample.ttft))
    return [(at, sample.n_output / len(times)) for at in times]


def _peak_second(good: Sequence[Sample]) -> float:
    seconds: dict[int, float] = {}
    for sample in good:
        for at, n in _events(sample):
            seconds[int(at)] = seconds.get(int(at), 0.0) + n
    return max(seconds.values(), default=0.0)


def _peak_concurrency(good: Sequence[Sample]) -> int:
    edges = [(s.start, 1) for s in good] + [(s.start + s.latency, -1) for s in good]
    return max(accumulate(step for _, step in sorted(edges)), default=0)
