"""What a simulation reports: the keys of `bench serve`, and what no client could see."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvarn.bench import metrics, record
from kvarn.bench.client import Sample
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.bench.sim_drafts import drafting_side
from kvarn.bench.stats import label
from kvarn.sim.heap import NS
from kvarn.sim.run import Outcome, Record
from kvarn.workload.trace import Trace

MOST_GAPS = 20_000_000  #: tokens beyond which gaps are kept as counts only


def report(
    fleet_: Fleet, work: Workload, traffic: Traffic, trace: Trace, outcome: Outcome
) -> dict[str, Any]:
    """The result under `bench serve`'s names, and what only a simulation knows."""
    samples = [sample_of(one) for one in outcome.records]
    done = [one for one in outcome.records if one.end is not None]
    duration = max((one.end or 0 for one in done), default=outcome.end) / NS or 1.0
    goodput = metrics.parse_goodput(traffic.goodput)
    result = record.header("sim", workload_of(work, traffic, trace), asdict(fleet_))
    result |= {
        "label": traffic.label,
        "model_id": fleet_.model,
        "num_prompts": len(trace),
        "request_rate": "inf" if math.isinf(traffic.request_rate) else traffic.request_rate,
        "burstiness": traffic.burstiness,
        "max_concurrency": None,
        **metrics.whole_run(samples, duration, traffic.percentiles, goodput),
        "targets_ms": goodput,
        "attainment": attainment(samples, len(trace), goodput),
        "steady": metrics.steady_window(samples, duration, traffic.percentiles),
        "error_counts": dict(Counter(s.error for s in samples if not s.ok).most_common(20)),
        **engine_side(fleet_, outcome, done, duration),
    }
    if outcome.gaps and not any(one.gaps for one in outcome.records):
        why = f"more than {MOST_GAPS} tokens: the gaps between them were counted, not kept"
        result |= token_gaps(outcome.gaps, traffic.percentiles)
        result["max_output_tokens_per_s"] = None
        result["steady"] = {"start": None, "end": None, "why_empty": why}
    if traffic.detailed:
        result |= metrics.detailed(samples)
        result["routing"] = [(one.instance, one.why) for one in outcome.records]
    return result


def attainment(samples: Sequence[Sample], sent: int, goodput: dict[str, float]) -> float | None:
    """Share of `sent` requests, refused and failed ones included, that met every target."""
    if not goodput:
        return None
    met = sum(sample.ok and metrics.meets(sample, goodput) for sample in samples)
    return met / sent if sent else 0.0


def engine_side(
    fleet_: Fleet, outcome: Outcome, done: list[Record], duration: float
) -> dict[str, Any]:
    """What a client cannot see: cache hits, preemptions, energy, and how well time is known."""
    prompts = sum(one.n_in for one in done)
    seconds = sum(one.busy for one in outcome.instances) / NS
    unmeasured = sum(one.unmeasured for one in outcome.instances)
    sent = Counter(one.instance for one in outcome.records if one.instance >= 0)
    return {
        "prefix_hit_rate": sum(one.cached for one in done) / prompts if prompts else 0.0,
        "preemptions": sum(one.control.stats().preemptions for one in outcome.instances),
        "energy_j": outcome.joules,
        "utilisation": seconds / (fleet_.instances * duration),
        "steps": sum(one.control.stats().steps for one in outcome.instances),
        "pages": outcome.instances[0].control.kv.pages[0],
        "pages_source": "given" if fleet_.pages else "formula",
        "page_size": outcome.instances[0].control.kv.page_size,
        "cost_model": outcome.instances[0].cost.name,
        "measured_share": max(0.0, 1.0 - unmeasured / seconds) if seconds else 0.0,
        "requests_by_instance": [sent[i] for i in range(fleet_.instances)],
        **drafting_side(outcome.instances),
    }


def workload_of(work: Workload, traffic: Traffic, trace: Trace) -> dict[str, Any]:
    """What must agree for two results to be comparable, the trace's history included."""
    about = {
        "trace": trace.name,
        "chain": list(trace.chain),
        "skipped": trace.skipped,
        "requests": len(trace),
        "closed_loop": traffic.closed_loop,
    }
    if traffic.trace is not None:
        return about
    rate = traffic.request_rate
    return asdict(work) | about | {
        "request_rate": "inf" if math.isinf(rate) else rate, "burstiness": traffic.burstiness,
    }  # fmt: skip


def sample_of(one: Record) -> Sample:
    """A record as the load generator's clients report requests."""
    sample = Sample(0, one.arrival / NS, 0.0, one.n_in, one.n_out, one.cached)
    if one.end is None or one.first is None:
        sample.error = one.error or "did not complete"
    else:
        sample.ttft = (one.first - one.arrival) / NS
        sample.latency = (one.end - one.arrival) / NS
        sample.itl = one.gaps or []
    return sample


def token_gaps(gaps: Counter[int], percentiles: tuple[float, ...]) -> dict[str, float]:
    """ITL of all tokens from their counts by gap [us]: exact to a microsecond."""
    total = sum(gaps.values())
    mean = sum(gap * n for gap, n in gaps.items()) / total if total else 0.0
    spread = math.fsum(n * (gap - mean) ** 2 for gap, n in gaps.items()) / total if total else 0.0
    found = {"mean_itl_ms": mean / 1000, "std_itl_ms": math.sqrt(spread) / 1000}
    ordered = sorted(gaps.items())
    shares = {"median": 50.0} | {label(share): share for share in percentiles}
    for name, share in shares.items():
        at, seen = (total - 1) * share / 100, 0
        found[f"{name}_itl_ms"] = 0.0
        for gap, n in ordered:
            seen += n
            if seen > at:
                found[f"{name}_itl_ms"] = gap / 1000
                break
    return found
