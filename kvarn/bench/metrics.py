"""From samples to numbers, under the definitions and key names of `vllm bench serve`.

TTFT: sent to the first event with tokens. ITL: between events with tokens, all requests together.
E2EL: sent to the last event with tokens. TPOT: (E2EL - TTFT) / (output tokens - 1), of requests
with at least two. Goodput: requests a second that met every target (TPOT is 0 for one token).
Throughputs are over the whole run, from its start to the last answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


@dataclass(slots=True)
class Events:
    """Every event with tokens, sample after sample."""

    at: NDArray[np.float64]  #: [s after the start of the run]
    tokens: NDArray[np.float64]  #: the answer's, shared out evenly among its events
    #: time since the sample's event before [s]; NaN: it is the sample's first
    since: NDArray[np.float64]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "Events":
        """The events of answered requests."""
        counts = [1 + len(sample.itl) for sample in samples]
        at, since = np.empty(sum(counts)), np.empty(sum(counts))
        tokens = np.repeat([s.n_output / n for s, n in zip(samples, counts, strict=True)], counts)
        first = 0
        for sample, count in zip(samples, counts, strict=True):
            end = first + count
            since[first], since[first + 1 : end] = sample.start + sample.ttft, sample.itl
            np.cumsum(since[first:end], out=at[first:end])
            since[first] = np.nan
            first = end
        return cls(at, tokens, since)

    @property
    def gaps(self) -> NDArray[np.float64]:
        """Between events of the same sample [s]."""
        return self.since[~np.isnan(self.since)]

    def between(self, begin: float, end: float) -> "Events":
        """Those from `begin` on and before `end` [s]."""
        inside = (begin <= self.at) & (self.at < end)
        return Events(self.at[inside], self.tokens[inside], self.since[inside])

    def peak_second(self) -> float:
        """The most tokens of a second of the run."""
        return float(np.bincount(self.at.astype(np.int64), self.tokens).max(initial=0.0))


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
    events = Events.of(good)
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
        "max_output_tokens_per_s": events.peak_second(),
        "max_concurrent_requests": _peak_concurrency(good),
    }
    cached = [sample.n_cached for sample in good if sample.n_cached is not None]
    found["total_cached_tokens"] = sum(cached) if cached else None
    found |= latencies(good, events.gaps, percentiles)
    found |= summary("client_queue_time", [sample.queued for sample in good], percentiles)
    return found


def latencies(
    good: Sequence[Sample], gaps: NDArray[np.float64], percentiles: Sequence[float]
) -> dict[str, float]:
    """The four latency measures of answered requests."""
    return {
        **summary("ttft", [sample.ttft for sample in good], percentiles),
        **summary("tpot", [tpot(s) for s in good if s.n_output > 1], percentiles),
        **summary("itl", gaps, percentiles),
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
        "itls": [list(sample.itl) for sample in samples],
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
    events = Events.of(good).between(begin, end)
    return {
        "definition": definition,
        "start": begin,
        "end": end,
        "completed": len(ended),
        "request_throughput": len(ended) / width,
        "output_throughput": float(events.tokens.sum()) / width,
        **summary("ttft", [s.ttft for s in inside], percentiles),
        **summary("tpot", [tpot(s) for s in ended if s.n_output > 1], percentiles),
        **summary("itl", events.gaps, percentiles),
        **summary("e2el", [s.latency for s in ended], percentiles),
    }


def meets(sample: Sample, goodput: dict[str, float]) -> bool:
    """Whether an answered request met every target [ms]."""
    seen = {"ttft": sample.ttft, "tpot": tpot(sample), "e2el": sample.latency}
    return all(seen[name] * 1000 <= most for name, most in goodput.items())


def _peak_concurrency(good: Sequence[Sample]) -> int:
    starts = np.array([sample.start for sample in good])
    ends = np.array([sample.start + sample.latency for sample in good])
    step = np.repeat([1, -1], len(good))
    order = np.lexsort((step, np.concatenate([starts, ends])))
    return int(step[order].cumsum().max(initial=0))
