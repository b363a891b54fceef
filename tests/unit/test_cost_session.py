"""The session model against the paper's worked example, and the laws of its throughput."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.cost.devices import find_device
from kvarn.cost.precision import Precision
from kvarn.cost.session import TECHNIQUES, SessionModel, Workload, session_model
from kvarn.models.hf_config import spec_from_config
from kvarn.models.shapes import SHAPES

#: Yi-34B-200K in bf16 on an A100 of 80 GB, with 20 GiB/s to the host: arXiv 2405.08944, section 2
YI = SessionModel(
    active=34e9, weights=68e9, read=68e9, layers=60, width=7168, kv_per_token=2 * 2 * 60 * 8 * 128,
    flops=312e12, bandwidth=2e12, memory=80e9, host=20 * 2**30, causal=1.0,
)  # fmt: skip


def test_the_worked_example_of_the_paper() -> None:
    assert YI.kv_bytes(4000) == pytest.approx(1.0e9, rel=0.05)
    assert YI.kv_bytes(50_000) == pytest.approx(12.3e9, rel=0.05)
    assert YI.concurrency(4000) == pytest.approx(12, rel=0.05)
    assert YI.concurrency(50_000) == pytest.approx(1, rel=0.05)
    assert YI.prefill(4000) == pytest.approx(0.89, rel=0.05)
    assert YI.prefill(50_000) == pytest.approx(14.1, rel=0.05)
    assert 250 * YI.decode(4000) == pytest.approx(8.5, rel=0.05)
    assert 250 * YI.decode(50_000) == pytest.approx(9.8, rel=0.05)
    assert YI.switch(50_000) == pytest.approx(1.1, rel=0.05)
    assert round(YI.switch(4000), 1) == 0.1
    assert YI.critical_tokens() == pytest.approx(156)


def test_attention_counted_in_full_makes_long_prefill_dearer() -> None:
    exact = dataclasses.replace(YI, causal=2.0)
    assert 17 < exact.prefill(50_000) < 18
    assert exact.prefill(4000) < 1.05 * YI.prefill(4000)


def test_tensor_parallelism_multiplies_concurrency_by_more_than_ranks() -> None:
    spec = spec_from_config(SHAPES["llama-3.1-8b"], "llama-3.1-8b")
    device = find_device("a100-40g")
    one, two, four = (session_model(spec, device, Precision(), tp) for tp in (1, 2, 4))
    assert one.kv_per_token == 131072 and one.weights == 2 * spec.n_params()
    assert two.concurrency(32_000) > 2 * one.concurrency(32_000)
    assert four.concurrency(32_000) > 2 * two.concurrency(32_000)
    assert four.prefill(32_000) == pytest.approx(one.prefill(32_000) / 4)
    assert four.decode(32_000) == pytest.approx(one.decode(32_000) / 4)
    half = session_model(spec, device, Precision(), mfu=0.5, mbu=0.5, link=0.5)
    assert half.prefill(1000) == 2 * one.prefill(1000)
    assert half.switch(1000) == 2 * one.switch(1000)


def test_one_user_gets_a_session_at_a_time() -> None:
    load = Workload(50_000, 250, turns=5, think=30.0)
    assert YI.throughput(load, 1) == pytest.approx(3600 / YI.alone(load))
    by_hand = YI.prefill(50_000) + 5 * (250 * YI.decode(50_000) + 30)
    assert YI.alone(load) == pytest.approx(by_hand)


def test_throughput_grows_until_saturation_and_drops_where_swaps_begin() -> None:
    load = Workload(4000, 250, turns=5, think=300.0)
    rates = [YI.throughput(load, users) for users in range(1, 30)]
    parts = YI.parts(load, 12)
    knee = 1 + load.turns * load.think / sum(parts.values())
    assert knee > 13
    assert rates[11] == pytest.approx(12 * rates[0])  # C = 12.2: nobody waits for another
    assert YI.parts(load, 12)["switch"] == 0
    assert YI.parts(load, 13)["switch"] == pytest.approx(5 * YI.switch(4000))
    busy = Workload(4000, 250, turns=5)
    assert YI.throughput(busy, 13) < YI.throughput(busy, 12)
    assert YI.throughput(busy, 12) == pytest.approx(3600 / YI.alone(busy))


def test_users_that_decode_together_share_the_weights() -> None:
    load = Workload(4000, 250)
    alone, batched = YI.throughput(load, 12), YI.throughput(load, 12, batched=True)
    assert batched > 4 * alone
    parts = YI.parts(load, 12, batched=True)
    assert sum(parts.values()) == pytest.approx(YI.prefill(4000) + 250 * YI.decode(4000, 12) / 12)
    assert parts["concurrency"] == 0
    assert YI.parts(load, 48, batched=True)["concurrency"] > 0


@pytest.mark.parametrize(
    ("load", "users", "batched", "channel"),
    [
        (Workload(100_000, 10), 1, False, "prefill"),
        (Workload(4000, 500), 8, False, "decode"),
        (Workload(20_000, 1, turns=30), 20, False, "switch"),
        (Workload(4000, 2000, turns=10), 200, True, "concurrency"),
        (Workload(4000, 100, think=1e5), 4, False, None),
    ],
)
def test_the_limiting_channel(
    load: Workload, users: int, batched: bool, channel: str | None
) -> None:
    limit, shares = YI.limits(load, users, batched=batched)
    assert limit == channel
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_technique_helps_exactly_the_channels_that_its_signs_name(name: str) -> None:
    technique = TECHNIQUES[name]
    better = YI.with_technique(technique, 2.0)
    signs = technique.signs()
    context = 50_000
    assert (better.concurrency(context) > YI.concurrency(context)) == bool(signs["concurrency"])
    assert (better.prefill(context) < YI.prefill(context)) == bool(signs["prefill"])
    assert (better.decode(context) < YI.decode(context)) == bool(signs["decode"])
    assert (better.switch(context) < YI.switch(context)) == bool(signs["switch"])


def test_named_signs() -> None:
    assert TECHNIQUES["selection (Quest, Tactic)"].signs() == {
        "concurrency": 0, "prefill": 0, "decode": 1, "switch": 0
    }  # fmt: skip
    assert TECHNIQUES["prefix reuse"].signs()["prefill"] == 1
    gem = TECHNIQUES["early layers choose the prompt (GemFilter)"]
    assert set(gem.signs().values()) == {1}


@given(
    st.integers(100, 200_000), st.integers(1, 1000), st.integers(1, 10), st.floats(0, 1000),
    st.integers(1, 100), st.booleans(),
)  # fmt: skip
def test_more_memory_bandwidth_and_arithmetic_never_hurt(
    context: int, answer: int, turns: int, think: float, users: int, batched: bool
) -> None:
    load = Workload(context, answer, turns, think)
    base = YI.throughput(load, users, batched=batched)
    assert base > 0
    for field in ("flops", "bandwidth", "memory", "host"):
        faster = dataclasses.replace(YI, **{field: 2 * getattr(YI, field)})
        # a larger batch makes each of its members wait, so memory may cost those who think
        if field != "memory" or not batched:
            assert faster.throughput(load, users, batched=batched) >= base * (1 - 1e-9)


def test_bad_sessions_are_refused() -> None:
    with pytest.raises(ConfigError, match="think time"):
        Workload(100, 10, 1, -1.0)
    with pytest.raises(ConfigError, match="users"):
        YI.throughput(Workload(100, 10), 0)
    with pytest.raises(ConfigError, match="more than 1"):
        YI.with_technique(TECHNIQUES["prefix reuse"], 1.0)
