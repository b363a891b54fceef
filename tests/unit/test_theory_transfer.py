"""Transfer formulas against discrete simulations, queues against Lindley's recursion."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.core.model import GroupSpec
from kvarn.kv.sizing import bytes_of
from kvarn.theory.queueing import little, md1_wait, mg1_wait, mm1_wait, sharing_sojourn
from kvarn.theory.transfer import (
    expert_parallel_bytes,
    fetch_seconds,
    is_hidden,
    kv_bytes_per_token,
    latent_bytes_per_token,
    layerwise_finish,
    micro_batches_to_hide,
    offload_bytes,
    offload_period,
    recompute_share,
    ring_prefill_bytes,
    tensor_parallel_bytes,
    whole_finish,
)

times = st.fractions(min_value=Fraction(1, 50), max_value=20, max_denominator=50)


def send_layers(ready: list[Fraction], each: Fraction) -> Fraction:
    """End of the last transfer on a link that takes one layer at a time, in order."""
    free = Fraction(0)
    for at in ready:
        free = max(free, at) + each
    return free


@settings(max_examples=200)
@given(times, st.integers(1, 90), times)
def test_overlap_equals_simulated_layers(prefill: Fraction, layers: int, each: Fraction) -> None:
    ready = [prefill * (k + 1) / layers for k in range(layers)]
    finish = send_layers(ready, each)
    assert layerwise_finish(prefill, layers, each) == finish
    assert whole_finish(prefill, layers, each) == send_layers([prefill] * layers, each)
    tokens, kv = 100, Fraction(7)
    hidden = is_hidden(kv, tokens / prefill, kv * tokens / (layers * each))
    assert hidden == (finish == prefill + each) or layers == 1


def simulate_offload(m: int, attention: Fraction, others: Fraction, link: Fraction) -> Fraction:
    """Time per layer over the second half of many layers, both devices serving in turn."""
    layers = 40
    ready = [Fraction(0)] * m
    free = {"attention": Fraction(0), "others": Fraction(0)}
    ends = []
    for _ in range(layers):
        for device, busy in (("attention", attention), ("others", others)):
            for i in range(m):
                free[device] = max(free[device], ready[i]) + busy
                ready[i] = free[device] + link
        ends.append(ready[0])
    return (ends[-1] - ends[layers // 2 - 1]) / (layers - layers // 2)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), *[st.integers(1, 12).map(Fraction)] * 3)
def test_offload_period_is_reached(
    m: int, attention: Fraction, others: Fraction, link: Fraction
) -> None:
    period = offload_period(m, attention, others, link)
    assert simulate_offload(m, attention, others, link) == period
    enough = micro_batches_to_hide(attention, others, link)
    slow = max(attention, others)
    assert offload_period(enough, attention, others, link) == enough * slow
    if enough > 1:
        assert offload_period(enough - 1, attention, others, link) > (enough - 1) * slow


@settings(max_examples=100)
@given(times, times, times, times)
def test_recompute_share_is_the_best(
    kv: Fraction, bandwidth: Fraction, flops: Fraction, speed: Fraction
) -> None:
    share = recompute_share(kv, bandwidth, flops, speed)
    best = fetch_seconds(1000, kv, bandwidth, flops, speed)
    for k in range(101):
        r = Fraction(k, 100)
        assert max((1 - r) * kv * 1000 / bandwidth, r * flops * 1000 / speed) >= best
    assert (1 - share) * kv * 1000 / bandwidth == best


def test_bytes_of_known_models() -> None:
    """Shapes from the models' config.json."""
    assert kv_bytes_per_token(30, 3, 64, 2) == 23040  # SmolLM2-135M
    assert kv_bytes_per_token(32, 8, 128, 2) == 131072  # Llama-3-8B
    assert kv_bytes_per_token(80, 8, 128, 2) == 327680  # Llama-3-70B
    assert latent_bytes_per_token(61, 512, 64, 2) == 70272  # DeepSeek-V3
    assert offload_bytes(32, 8, 128, 2, partial=False) == (12288, 8192)
    assert offload_bytes(32, 8, 128, 2, partial=True) == (12288, 8192 + 256)


def test_kv_bytes_equal_the_pool() -> None:
    group = GroupSpec(tuple(range(30)), 3, 64, None)
    pool = bytes_of([group], [11], 16, 2)
    assert pool == 11 * 16 * kv_bytes_per_token(30, 3, 64, 2)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_collectives_equal_counted_sends(ranks: int) -> None:
    hidden, layers, size = 48, 4, 2
    chunk = hidden * size // ranks
    sends = 2 * (ranks - 1)  # reduce-scatter, then all-gather, one chunk to the next rank a step
    assert tensor_parallel_bytes(layers, hidden, ranks, size) == 2 * layers * sends * chunk
    away = sum(1 for home in range(ranks) for expert in range(ranks) if home != expert)
    row = 2 * 2 * hidden * size  # there and back, top 2
    mean = layers * row * Fraction(away, ranks * ranks)
    assert expert_parallel_bytes(layers, 2, hidden, ranks, size) == mean
    assert ring_prefill_bytes(24, 5, ranks) == (ranks - 1) * 5 * (24 // ranks)


def lindley(rate: float, service: list[float], seed: int) -> float:
    """Mean wait of a first-come queue with Poisson arrivals, by its recursion."""
    rng, wait, total = random.Random(seed), 0.0, 0.0
    for s in service:
        total += wait
        wait = max(0.0, wait + s - rng.expovariate(rate))
    return total / len(service)


def test_waiting_times() -> None:
    rng, n = random.Random(7), 200_000
    assert lindley(0.6, [1.0] * n, 1) == pytest.approx(md1_wait(0.6, 1.0), rel=0.03)
    spread = [rng.expovariate(1.0) for _ in range(n)]
    assert lindley(0.6, spread, 2) == pytest.approx(mm1_wait(0.6, 1.0), rel=0.05)
    two = [rng.choice((0.5, 1.5)) for _ in range(n)]
    assert lindley(0.6, two, 3) == pytest.approx(mg1_wait(0.6, 1.0, 1.25), rel=0.05)


def test_queue_identities() -> None:
    assert mm1_wait(0.5, 1.0) + 1.0 == pytest.approx(sharing_sojourn(0.5, 1.0)) == 2.0
    assert sharing_sojourn(0.5, 1.0, own=3.0) == 6.0
    assert little(0.5, 2.0) == 1.0
    assert md1_wait(0.5, 1.0) == mm1_wait(0.5, 1.0) / 2


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="no steady state"):
        md1_wait(1.0, 1.0)
    with pytest.raises(ConfigError, match="negative"):
        md1_wait(-1.0, 1.0)
    with pytest.raises(ConfigError, match="below"):
        mg1_wait(0.1, 2.0, 3.0)
    with pytest.raises(ConfigError, match="at least one layer"):
        layerwise_finish(1.0, 0, 1.0)
    with pytest.raises(ConfigError, match="micro-batch"):
        offload_period(0, 1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="two devices"):
        micro_batches_to_hide(0.0, 0.0, 1.0)
