"""`kvarn bench latency`: TTFT, time a token and whole time of a batch, by batch size."""

import statistics
from dataclasses import asdict
from random import Random
from typing import Any

from kvarn.bench import record
from kvarn.bench.engines import burst
from kvarn.bench.options import Latency
from kvarn.bench.prompts import tokens
from kvarn.bench.stats import percentile
from kvarn.core.errors import ConfigError

PERCENTILES = (10, 25, 50, 75, 90, 99)


def run(llm: Any, how: Latency) -> dict[str, Any]:
    """Measure on a loaded engine; one entry a batch size, under `vllm bench latency`'s names."""
    check(how)
    config = {row["option"]: row["value"] for row in llm.engine.explain()["options"]}
    rng = Random("latency")
    rows = [_size(llm, how, size, rng) for size in how.batch_sizes]
    result = record.header("latency", asdict(how), config)
    result |= {"model_id": config["model"], "results": rows}
    if len(rows) == 1:
        result |= {name: rows[0][name] for name in ("avg_latency", "latencies", "percentiles")}
    return result


def check(how: Latency) -> None:
    """Raise `ConfigError` for what cannot be run."""
    least = {"input_len": 1, "output_len": 1, "warmups": 0, "iterations": 1}
    for name, value in least.items():
        if getattr(how, name) < value:
            raise ConfigError(f"{name} must be at least {value}, got {getattr(how, name)}")
    if not how.batch_sizes or min(how.batch_sizes) < 1:
        raise ConfigError("batch_sizes must be numbers above 0, such as 1,4,16")


def _size(llm: Any, how: Latency, size: int, rng: Random) -> dict[str, Any]:
    """Seconds of whole batches, and milliseconds to the first and for each further token."""
    latencies, ttfts, tpots = [], [], []
    for i in range(how.warmups + how.iterations):
        prompts = [tokens(how.input_len, llm.spec.vocab, rng) for _ in range(size)]
        done = burst(llm, prompts, [how.output_len] * size)
        if i < how.warmups:
            continue
        latencies.append(done.seconds)
        ttfts += done.first_token
        for first, total in zip(done.first_token, done.total, strict=True):
            tpots.append((total - first) / max(1, how.output_len - 1))
    ordered = sorted(latencies)
    return {
        "batch_size": size,
        "avg_latency": statistics.fmean(latencies),
        "latencies": latencies,
        "percentiles": {str(p): percentile(ordered, p) for p in PERCENTILES},
        "median_ttft_ms": statistics.median(ttfts) * 1000,
        "median_tpot_ms": statistics.median(tpots) * 1000,
        "output_tokens_per_second": size * how.output_len / statistics.median(latencies),
    }
