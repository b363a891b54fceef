"""Bounds of a whole run against an explicit machine that is as good as allowed."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.theory.bounds import lower_bounds
from kvarn.workload.trace import TraceRequest


def serve(
    requests: list[TraceRequest], *, kv: int, step: float, budget: int, seqs: int
) -> tuple[list[float], list[float]]:
    """(TTFT, E2E) of an engine with one step time, chunked prefill and first-come admission.

    A request is admitted when its whole peak fits beside the peaks of the running ones.
    """
    waiting = sorted(requests, key=lambda r: r.at)
    running: list[list[float]] = []  # [request index, prompt left, answer left]
    now, ttft, e2e, index = 0.0, [0.0] * len(requests), [0.0] * len(requests), 0
    while index < len(waiting) or running:
        if not running and index < len(waiting):
            now = max(now, waiting[index].at)
        while index < len(waiting) and waiting[index].at <= now and len(running) < seqs:
            request = waiting[index]
            peaks = sum(waiting[int(i)].n_in + waiting[int(i)].n_out for i, *_ in running)
            if peaks + request.n_in + request.n_out > kv:
                break
            running.append([index, request.n_in, request.n_out])
            index += 1
        now += step
        room = budget
        for slot in running:
            chunk = min(room, slot[1] or 1)
            room -= chunk
            prompt_left = max(0, slot[1] - chunk) if slot[1] else 0
            if chunk and not prompt_left:
                request = waiting[int(slot[0])]
                if slot[2] == request.n_out:
                    ttft[int(slot[0])] = now - request.at
                slot[2] -= 1
                e2e[int(slot[0])] = now - request.at
            slot[1] = prompt_left
        running = [slot for slot in running if slot[2] > 0]
    return ttft, e2e


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 6), st.integers(2, 40))
def test_no_engine_beats_them(seed: int, n: int, seqs: int, budget: int) -> None:
    rng = random.Random(seed)
    requests = [
        TraceRequest(str(i), rng.uniform(0, 20), rng.randint(1, 60), rng.randint(1, 20))
        for i in range(n)
    ]
    ttft, e2e = serve(requests, kv=100, step=0.5, budget=budget, seqs=seqs)
    bounds = lower_bounds(
        requests,
        kv_tokens=100,
        seconds_per_round=0.5,
        peak_tokens_per_s=budget / 0.5,
        max_seqs=seqs,
    )
    first = min(r.at for r in requests)
    ordered = sorted(requests, key=lambda r: r.at)
    span = max(r.at + t for r, t in zip(ordered, e2e)) - first
    assert bounds["mean_ttft"] <= sum(ttft) / n + 1e-9
    assert bounds["mean_e2e"] <= sum(e2e) / n + 1e-9
    assert bounds["makespan"] <= span + 1e-9
    assert bounds["output_tokens_per_s"] >= sum(r.n_out for r in requests) / span - 1e-9
    assert bounds["hit_rate"] == bounds["hit_rate_unlimited"] == 0


def test_each_resource_can_be_the_tight_one() -> None:
    requests = [TraceRequest(str(i), 0.0, 10, 11) for i in range(4)]

    def bound(**changed: float) -> dict[str, float]:
        fast = {"kv_tokens": 10**9, "seconds_per_round": 1e-6, "peak_tokens_per_s": 1e12}
        return lower_bounds(requests, **(fast | changed))  # type: ignore[arg-type]

    assert bound(seconds_per_round=1.0)["mean_e2e"] == 11.0
    assert bound(peak_tokens_per_s=20.0)["makespan"] == pytest.approx(4 * 20 / 20)
    assert bound(peak_tokens_per_s=20.0)["mean_e2e"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert bound(peak_tokens_per_s=10.0)["mean_ttft"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    volume = 11 * 10 + 11 * 10 / 2  # positions held over the 11 steps
    tight = bound(seconds_per_round=1.0, kv_tokens=15)
    assert tight["makespan"] == pytest.approx(4 * volume / 15)
    assert tight["stable_requests_per_s"] == pytest.approx(15 / volume)
    assert bound(seconds_per_round=1.0, max_seqs=1)["makespan"] == 44.0


def test_shared_prefixes_are_computed_once() -> None:
    requests = [TraceRequest(str(i), float(i), 20, 1, (0, 100 + i)) for i in range(5)]
    machine = {"kv_tokens": 16, "seconds_per_round": 0.01, "peak_tokens_per_s": 1.0}
    bounds = lower_bounds(requests, block_size=16, **machine)  # type: ignore[arg-type]
    assert bounds["makespan"] == 16 + 5 * 4  # the common block once, four tokens of each
    assert bounds["hit_rate"] == bounds["hit_rate_unlimited"] == 4 * 16 / 100
    apart = lower_bounds(requests, block_size=16, shared=False, **machine)  # type: ignore[arg-type]
    assert apart["makespan"] == 100 and apart["hit_rate"] == 0


def test_refusals() -> None:
    request = TraceRequest("a", 0.0, 1, 1)
    with pytest.raises(ConfigError, match="at least one request"):
        lower_bounds([], kv_tokens=1, seconds_per_round=1, peak_tokens_per_s=1)
    with pytest.raises(ConfigError, match="kv_tokens is 0"):
        lower_bounds([request], kv_tokens=0, seconds_per_round=1, peak_tokens_per_s=1)
    empty = TraceRequest("b", 0.0, 1, 0)
    with pytest.raises(ConfigError, match="request 0 has 1 prompt and 0 answer"):
        lower_bounds([empty], kv_tokens=1, seconds_per_round=1, peak_tokens_per_s=1)
