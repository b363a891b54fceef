"""Prometheus metrics of one server, in a registry of its own."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvarn.core.output import EngineStats, TrainerStats

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960)
_LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class EngineState(Collector):
    """What the engine says of itself; refreshed before each scrape."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.ready = False
        self.restarts = 0

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters of the latest snapshot."""
        s = self.stats
        pages = max(1, s.kv_pages)
        gauges: dict[str, tuple[str, float]] = {
            "engine_ready": ("1 when the engine takes requests", float(self.ready)),
            "requests_running": ("sequences in the batch", s.running),
            "requests_waiting": ("sequences in the queue", s.waiting),
            "kv_pages": ("KV pages of the first group", s.kv_pages),
            "kv_pages_used": ("KV pages held by sequences", s.kv_pages_used),
            "kv_pages_cached": ("idle KV pages kept for prefix hits", s.kv_pages_cached),
            "kv_usage_ratio": ("KV pages held by sequences, as a share", s.kv_pages_used / pages),
            "prefix_cache_hit_ratio": (
                "prompt tokens found in the prefix cache, as a share since start",
                s.cached_tokens / max(1, s.prompt_tokens),
            ),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"kvarn_{name}", text, value=value)
        counters: dict[str, tuple[str, float]] = {
            "preemptions": ("sequences sent back to the queue", s.preemptions),
            "prefix_cache_queried_tokens": ("prompt tokens looked up", s.prompt_tokens),
            "prefix_cache_hit_tokens": ("prompt tokens found", s.cached_tokens),
            "drafted_tokens": ("tokens that speculation proposed", s.drafted_tokens),
            "accepted_draft_tokens": ("of those, accepted", s.accepted_tokens),
            "steps": ("engine steps", s.steps),
            "verify_steps": ("steps that verified drafts", s.verify_steps),
            "verify_steps_replayed": (
                "of those, replayed whole from captured graphs",
                s.replayed_verify_steps,
            ),
            "engine_restarts": ("engine processes started after the first", self.restarts),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"kvarn_{name}", text, value=value)
        if s.trainer is not None:
            yield from _of_trainer(s.trainer)


def _of_trainer(s: TrainerStats) -> Iterator[Metric]:
    """Training of the drafter on live traffic."""
    gauges: dict[str, tuple[str, float]] = {
        "drafter_training": ("1 while the drafter learns, 0 after an error", float(not s.failed)),
        "drafter_version": ("version of the drafter's weights in force", s.version),
        "drafter_acceptance_ratio": ("share of judged drafts accepted, lately", s.acceptance),
        "drafter_acceptance_ratio_before": (
            "share of judged drafts accepted, under the version before", s.acceptance_before,
        ),
        "drafter_lessons_waiting": ("ended sequences to be learnt from", s.lessons),
        "drafter_loss_nats": ("loss of the last update", s.loss),
    }  # fmt: skip
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(f"kvarn_{name}", text, value=value)
    counters: dict[str, tuple[str, float]] = {
        "drafter_updates": ("versions of the drafter put in force", s.published),
        "drafter_rollbacks": ("versions of the drafter taken back", s.rolled_back),
        "drafter_lessons_dropped": ("ended sequences never learnt from", s.dropped),
        "drafter_training_seconds": ("time taken by training", s.seconds),
    }
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(f"kvarn_{name}", text, value=value)


class Metrics:
    """Counted in the API process, over the life of the server."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.engine = EngineState()
        registry.register(self.engine)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"kvarn_{name}", text, buckets=buckets, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"kvarn_{name}", text, labels, registry=registry)

        self.first_token = histogram("time_to_first_token_seconds", "TTFT", _FIRST)
        self.inter_token = histogram("inter_token_latency_seconds", "ITL", _TOKEN)
        self.per_token = histogram(
            "time_per_output_token_seconds",
            "TPOT: mean after the first token",
            _TOKEN,
        )
        self.whole = histogram("request_latency_seconds", "arrival to the last token", _WHOLE)
        self.queue = histogram("queue_time_seconds", "arrival to the first batch", _FIRST)
        self.prompt_length = histogram("request_prompt_tokens", "tokens of a prompt", _LENGTH)
        self.output_length = histogram("request_output_tokens", "tokens of a request", _LENGTH)
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts that were answered")
        self.output_tokens = counter("output_tokens", "tokens generated")
        self.requests = counter("requests", "requests that ended, by reason", ("finish",))
        self.refused = counter("requests_refused", "requests not taken, by code", ("code",))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
