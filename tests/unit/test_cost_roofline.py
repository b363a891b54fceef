"""The roofline against hand-computed values, published speeds, and the laws that it must obey."""

import dataclasses
import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.cost.build import USABLE, cost_model, kv_capacity
from kvarn.cost.collective import all_gather, all_reduce, all_to_all, pipeline_rounds
from kvarn.cost.devices import DEVICES, GIB, find_device
from kvarn.cost.energy import MEMORY_POWER, joules
from kvarn.cost.link import Link
from kvarn.cost.moe import MoEShape, active_experts
from kvarn.cost.perturb import TERMS, Perturbed, draws
from kvarn.cost.precision import Precision, precision
from kvarn.cost.roofline import Host, Roofline, seen_by
from kvarn.cost.shape import Estimate, StepShape
from kvarn.models.hf_config import spec_from_config
from kvarn.models.shapes import SHAPES

TRACES = Path(os.environ.get("KVARN_TRACES", Path(__file__).parents[3] / "shared" / "traces"))
LLAMA = spec_from_config(SHAPES["llama-3.1-8b"], "llama-3.1-8b")
LLAMA_70B = spec_from_config(SHAPES["llama-3.1-70b"], "llama-3.1-70b")
H100 = find_device("H100")
IDEAL = dataclasses.replace(H100, mfu=1, attention_mfu=1, mbu=1, launch=0)
TINY = ModelSpec("llama", "tiny", 2, 64, 128, 4, 2, 16, 100, 1024)
ONE = StepShape((), 1, 257, 257, 1)


def decode(n: int, context: int) -> StepShape:
    return StepShape((), n, n * context, context, n)


def prefill(*chunks: tuple[int, int]) -> StepShape:
    return StepShape(chunks, 0, 0, 0, len(chunks))


# -- hand-computed values -------------------------------------------------------------------------


def test_decode_reads_weights_and_kv_once_at_peak_bandwidth() -> None:
    got = Roofline(LLAMA, IDEAL).step(ONE)
    layer = 4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    weights = 2 * (32 * layer + 4096 * 128256)
    assert got.linear == pytest.approx(weights / 3.35e12, rel=2e-3)  # the rest: activations
    assert got.decode == pytest.approx(257 * 131072 / 3.35e12)
    assert got.prefill == got.experts == got.comm == got.confidence == 0


def test_prefill_is_two_operations_a_weight_and_causal_attention() -> None:
    got = Roofline(LLAMA, IDEAL).step(prefill((4096, 4096)))
    body = 32 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    # the head reads its weights for one row; two small kernels a layer move the activations
    head = 2 * 4096 * 128256 / 3.35e12
    small = 32 * 2 * 2 * 4096 * 4096 * 2 / 3.35e12
    assert got.linear == pytest.approx(2 * body * 4096 / 989e12 + head + small, rel=1e-3)
    assert got.prefill == pytest.approx(4 * 4096 * 32 * 4096 * 4097 / 2 / 989e12)


def test_launches_are_the_time_of_a_tiny_model() -> None:
    device = dataclasses.replace(IDEAL, launch=1.0)
    got = Roofline(TINY, device).step(ONE)
    # four products and two small kernels a layer, the head; three kernels of attention a layer
    assert got.linear == pytest.approx(2 * (4 + 2) + 1)
    assert got.decode == pytest.approx(2 * 3)


def test_positions_seen_by_rows_equal_brute_force() -> None:
    for rows, before, window in itertools.product((1, 3, 7), (0, 2, 9), (None, 1, 4, 5, 100)):
        context = before + rows
        each = [min(p, window or p) for p in range(before + 1, context + 1)]
        assert seen_by(rows, context, window) == sum(each)


def test_windows_cut_decode_attention() -> None:
    half = dataclasses.replace(LLAMA, windows=(1024, None) * 16)
    full, cut = (Roofline(s, IDEAL).step(decode(8, 8192)).decode for s in (LLAMA, half))
    assert cut == pytest.approx(full * (1024 + 8192) / (2 * 8192))


def test_unequal_contexts_cost_more_and_at_most_twice() -> None:
    model = Roofline(LLAMA, IDEAL, skew=0.1)
    even = model.step(StepShape((), 4, 4000, 1000, 4)).decode
    slight = model.step(StepShape((), 4, 4000, 1500, 4)).decode
    extreme = model.step(StepShape((), 64, 64 * 1000, 60000, 64)).decode
    assert slight == pytest.approx(even * 1.05)  # 10 % of the half that the longest is above
    assert extreme == pytest.approx(2 * model.step(decode(64, 1000)).decode)


def test_host_hides_behind_computation_or_adds_to_it() -> None:
    host = Host(step=1e-3, seq=1e-5, exposed=1e-5)
    hidden = Roofline(LLAMA, H100, host=host).step(decode(10, 100))
    serial = Roofline(LLAMA, H100, host=host, overlap=False).step(decode(10, 100))
    assert hidden.host == 1e-5
    assert serial.host == pytest.approx(1.1e-3)
    assert serial.seconds - hidden.seconds == pytest.approx(1.1e-3 - 1e-5)
    small = Roofline(TINY, H100, host=host).step(ONE)
    assert small.seconds == pytest.approx(1.01e-3)  # bound by the host


# -- ranks ----------------------------------------------------------------------------------------


def test_collectives_by_hand() -> None:
    link = Link("test", 1.0, 10.0, 0.0)
    assert all_reduce(40, 4, link) == 1 + 2 * 3 / 4 * 40 / 10
    assert all_gather(40, 4, link) == all_to_all(40, 4, link) == 1 + 3 / 4 * 40 / 10
    assert all_reduce(40, 1, link) == all_gather(40, 1, link) == all_to_all(40, 1, link) == 0
    assert pipeline_rounds(4, 8) == 11


def test_tensor_parallelism_divides_the_work_and_pays_two_sums_a_layer() -> None:
    one, four = Roofline(LLAMA, IDEAL), Roofline(LLAMA, IDEAL, tp=4)
    shape = decode(32, 2048)
    a, b = one.step(shape), four.step(shape)
    assert b.decode == pytest.approx(a.decode / 4)
    assert a.linear / 4 <= b.linear <= a.linear / 4 * 1.02
    assert b.comm == pytest.approx(64 * all_reduce(32 * 4096 * 2, 4, H100.peer))
    assert four.idle_watts() == 4 * one.idle_watts()


def test_more_ranks_than_kv_heads_copy_them() -> None:
    eight, sixteen = (Roofline(LLAMA, IDEAL, tp=tp) for tp in (8, 16))
    assert sixteen.step(decode(8, 9000)).decode == eight.step(decode(8, 9000)).decode


def test_stages_do_not_shorten_one_batch_but_overlap_several() -> None:
    shape = prefill((8192, 8192))
    alone = Roofline(LLAMA, IDEAL).step(shape)
    staged = Roofline(LLAMA, IDEAL, pp=4).step(shape)
    filled = Roofline(LLAMA, IDEAL, pp=4, microbatches=8).step(shape)
    assert staged.linear == pytest.approx(alone.linear)
    assert staged.comm == pytest.approx(3 * H100.peer.seconds(8192 * 4096 * 2))
    assert filled.prefill == pytest.approx(alone.prefill * 11 / 8 / 4)
    assert filled.seconds < 0.4 * staged.seconds


# -- experts --------------------------------------------------------------------------------------


def test_expected_active_experts() -> None:
    assert active_experts(8, 2, 1) == pytest.approx(2)
    assert active_experts(8, 2, 2) == pytest.approx(8 * (1 - 0.75**2))
    assert active_experts(8, 2, 1000) == pytest.approx(8)
    with pytest.raises(ConfigError, match="topk=9"):
        MoEShape(8, 9, 64, 2)


def test_experts_read_only_those_awake() -> None:
    moe = MoEShape(64, 4, 1024, 32)
    model = Roofline(LLAMA, IDEAL, moe=moe)
    one = model.step(ONE)
    router = 32 * 4096 * 64 * 2 / 3.35e12
    assert one.experts == pytest.approx(32 * 4 * 3 * 4096 * 1024 * 2 / 3.35e12 + router, rel=1e-2)
    dense = Roofline(LLAMA, IDEAL).step(ONE).linear - one.linear
    assert dense == pytest.approx(32 * 3 * 4096 * 14336 * 2 / 3.35e12, rel=1e-2)
    assert model.step(decode(256, 257)).experts > 10 * one.experts
    shared = Roofline(LLAMA, IDEAL, moe=dataclasses.replace(moe, shared=2)).step(ONE)
    assert shared.experts - one.experts == pytest.approx(one.experts / 2, rel=0.05)


def test_expert_parallelism_moves_tokens_instead_of_summing() -> None:
    moe = MoEShape(64, 4, 1024, 32)
    sums = Roofline(LLAMA, IDEAL, tp=8, moe=moe).step(decode(64, 100))
    moves = Roofline(LLAMA, IDEAL, tp=8, moe=moe, expert_parallel=True).step(decode(64, 100))
    n_bytes = 64 * 4096 * 2
    peer = H100.peer
    assert sums.comm == pytest.approx(64 * all_reduce(n_bytes, 8, peer))
    assert moves.comm == pytest.approx(
        32 * all_reduce(n_bytes, 8, peer) + 64 * all_to_all(n_bytes / 8 * 4, 8, peer)
    )
    assert moves.experts == sums.experts


# -- laws -----------------------------------------------------------------------------------------

COUNTS = st.integers(1, 300)
CONTEXTS = st.integers(1, 30000)
MODELS = [
    cost_model(LLAMA, device="h100"),
    cost_model(LLAMA, device="h200", tp=4, quantization="fp8"),
    Roofline(dataclasses.replace(TINY, windows=(8, None)), DEVICES["cpu"], overlap=False),
]


@given(st.sampled_from(MODELS), COUNTS, CONTEXTS, COUNTS, CONTEXTS)
def test_more_work_never_takes_less(
    model: Roofline, n: int, context: int, more: int, longer: int
) -> None:
    base = model.step(decode(n, context)).seconds
    eps = 1e-12
    assert model.step(decode(n + more, context)).seconds >= base - eps
    assert model.step(decode(n, context + longer)).seconds >= base - eps
    mixed = StepShape(((more + 1, more + 1 + longer),), n, n * context, context, n)
    assert model.step(mixed).seconds >= base - eps
    chunk = prefill((more + 1, more + 1 + context))
    further = prefill((more + 1, more + 1 + context + longer))
    assert model.step(further).seconds >= model.step(chunk).seconds - eps


@given(st.sampled_from(MODELS), COUNTS, CONTEXTS)
def test_energy_lies_between_idle_and_peak(model: Roofline, n: int, context: int) -> None:
    got = model.step(decode(n, context))
    n_devices = model.tp * model.pp
    assert model.idle_watts() * got.seconds <= got.joules * (1 + 1e-9)
    assert got.joules <= n_devices * model.device.peak_watts * got.seconds * (1 + 1e-9)


def test_energy_adds_up_by_hand() -> None:
    idle, peak = H100.idle_watts, H100.peak_watts
    got = joules(H100, 2, 1.0, 0.25, 0.5)
    assert got == 2 * (idle + (peak - idle) * (0.25 + MEMORY_POWER * 0.5))
    assert joules(H100, 1, 1.0, 1.0, 1.0) == peak
    assert joules(H100, 1, 3.0, 0.0, 0.0) == 3 * idle


def test_decode_draws_less_power_than_prefill() -> None:
    model = Roofline(LLAMA, H100)
    watts = [e.joules / e.seconds for e in map(model.step, (ONE, prefill((8192, 8192))))]
    assert 0.4 * H100.peak_watts < watts[0] < 0.7 * H100.peak_watts < watts[1] <= H100.peak_watts


def test_empty_step_costs_the_host_and_idle_power() -> None:
    got = Roofline(LLAMA, H100).step(StepShape())
    assert got.seconds == got.host > 0
    assert got.joules == pytest.approx(got.host * H100.idle_watts)


# -- against published speeds ---------------------------------------------------------------------


def test_8b_on_an_h100_is_where_measurements_lie() -> None:
    """Floor of 207 tok/s for one stream, and vLLM's prefill rate: docs/results.md, section GPU."""
    model = cost_model(LLAMA, device="h100")
    one_stream = 1 / model.step(ONE).seconds
    assert 0.75 * 207 < one_stream < 207
    rate = 8192 / model.step(prefill(*[(1024, 1024)] * 8)).seconds
    assert 40_000 < rate < 55_000


def test_8b_decode_on_an_a100_and_on_a_4090_is_bound_by_bandwidth() -> None:
    times = [cost_model(LLAMA, device=d).step(ONE).linear for d in ("a100-80g", "rtx4090")]
    assert times[1] / times[0] == pytest.approx(2039 / 1008, rel=0.05)


# -- configurations -------------------------------------------------------------------------------


def test_precision_from_the_words_of_the_engine() -> None:
    assert precision(H100, "bfloat16", "none", "auto") == Precision()
    assert precision(H100, "bfloat16", "fp8", "fp8") == Precision(1, 2, 2, 1, "fp8", "bf16")
    int4 = precision(H100, "bfloat16", "int4", "auto")
    assert (int4.weight, int4.head, int4.compute) == (0.625, 1, "bf16")
    assert Precision().weight_bytes(LLAMA) == 2 * LLAMA.n_params()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "h1000"}, "did you mean 'h100'"),
        ({"device": "a100-80g", "quantization": "fp8"}, "does not multiply in fp8"),
        ({"device": "t4", "dtype": "bfloat16"}, "does not multiply in bf16"),
        ({"device": "h100", "dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ({"device": "h100", "quantization": "int5"}, "unknown quantization 'int5'"),
        ({"device": "h100", "kv_dtype": "fp4"}, "did you mean 'fp8'"),
        ({"device": "h100", "tp": 3}, "tp may be 1, 2, 4, 8, 16"),
        ({"device": "h100", "pp": 33}, "more than the 32 layers"),
        ({"device": "h100", "tp": 0}, "at least 1"),
        ({"device": "h100", "source": "tables"}, "did you mean 'table'"),
        ({"device": "h100", "table": "x.csv"}, "source='table'"),
        ({"device": "h100", "source": "fitted"}, "needs a table"),
        ({"device": "h100", "source": "table", "table": "x", "pp": 2}, "no table covers pp"),
        ({"device": "h100", "source": "table", "table": "absent.json"}, "cannot read absent.json"),
        ({"device": "l4", "dtype": "float32"}, "29.9 GiB of weights; 1 x l4 hold 21.6 GiB"),
        ({"device": "l4", "dtype": "float32"}, "tp=2, device='h100'"),
    ],
)
def test_impossible_configurations_say_what_would_work(
    options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cost_model(LLAMA, **options)  # type: ignore[arg-type]


@pytest.mark.skipif(not (TRACES / "perf").exists(), reason="the tables are not here")
def test_tables_are_asked_for_by_the_device_and_the_words_of_the_engine() -> None:
    folder = str(TRACES / "perf")
    plain = cost_model(LLAMA, device="h100", source="table", table=folder)
    codes = cost_model(
        LLAMA, device="h100", source="table", table=folder, quantization="fp8", kv_dtype="fp8"
    )
    shape = decode(32, 1024)
    assert codes.step(shape).seconds < plain.step(shape).seconds
    assert plain.step(shape).confidence > 0


@pytest.mark.skipif(not (TRACES / "perf").exists(), reason="the tables are not here")
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("spec", [LLAMA, LLAMA_70B])
def test_the_roofline_lies_near_measured_h100_kernels(spec: ModelSpec, tp: int) -> None:
    folder = str(TRACES / "perf")
    analytic = cost_model(spec, device="h100", tp=tp)
    measured = cost_model(spec, device="h100", tp=tp, source="table", table=folder)
    mixed = StepShape(((512, 512),), 32, 32 * 1024, 1024, 33)
    for shape in (decode(1, 2048), decode(64, 2048), prefill((4096, 4096)), mixed):
        got = analytic.step(shape).seconds / measured.step(shape).seconds
        assert 0.75 < got < 1.2, shape


def test_70b_needs_several_h100() -> None:
    with pytest.raises(ConfigError, match=r"131\.4 GiB of weights; 1 x h100.*tp=2"):
        cost_model(LLAMA_70B, device="h100")
    assert cost_model(LLAMA_70B, device="h100", tp=2).step(ONE).seconds > 0


def test_kv_capacity_is_what_the_weights_leave() -> None:
    room = kv_capacity(LLAMA, "h100")
    assert room == int(USABLE * 80 * GIB - 2 * LLAMA.n_params())
    assert kv_capacity(LLAMA, "h100", 2) > 2 * room
    assert kv_capacity(LLAMA, "h100", quantization="fp8") > room


def test_every_device_prices_a_step_and_names_its_source() -> None:
    for device in DEVICES.values():
        form = "bf16" if "bf16" in device.flops else "fp16"
        numbers = precision(device, {"bf16": "bfloat16", "fp16": "float16"}[form], "none", "auto")
        got = Roofline(TINY, device, numbers).step(ONE)
        assert got.seconds > 0 and got.joules > 0
        assert device.source and device.idle_watts < device.peak_watts
        assert 0 < device.mbu <= 1 and 0 < device.mfu <= 1


# -- perturbation ---------------------------------------------------------------------------------


def test_perturbed_scales_each_term_alone() -> None:
    model = Roofline(LLAMA, H100, tp=2)
    shape = StepShape(((512, 1024),), 8, 8000, 2000, 9)
    plain = model.step(shape)
    for term in TERMS:
        got = Perturbed(model, {term: 3.0}).step(shape)
        extra = 2 * getattr(plain, term)
        assert getattr(got, term) == pytest.approx(3 * getattr(plain, term))
        assert got.seconds == pytest.approx(plain.seconds + extra)
        assert got.joules / got.seconds == pytest.approx(plain.joules / plain.seconds)
    assert Perturbed(model, {}).step(shape) == plain
    assert model.step(shape) == plain


def test_terms_are_all_that_estimates_add_up() -> None:
    assert Estimate(**dict.fromkeys(TERMS, 1.0)).seconds == len(TERMS)


def test_draws_are_lognormal_and_repeatable() -> None:
    got = draws({"linear": 0.1, "decode": 0.3}, 2000, seed=1)
    assert got == draws({"linear": 0.1, "decode": 0.3}, 2000, seed=1) != draws({}, 2000, seed=1)
    linear = sorted(d["linear"] for d in got)
    assert linear[1000] == pytest.approx(1.0, abs=0.01)
    assert linear[1682] == pytest.approx(1.105, abs=0.015)  # one deviation up: exp(0.1)
    assert all(d["host"] == 1.0 for d in got)
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        draws({"linar": 0.1}, 1, seed=0)
    with pytest.raises(ConfigError, match="positive"):
        Perturbed(Roofline(TINY, H100), {"linear": 0.0})
