"""Cost models from measured tables: what they predict, how sure they are, what they refuse."""

import csv
import gzip
import json
import os
import random
import statistics
import timeit
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.cost.grid import Grid
from kvarn.cost.kernel_grids import attention_grid, expert_grid, gemm_grid, pairs, read_peak
from kvarn.cost.kernel_tables import KernelTables
from kvarn.cost.layer_tables import LayerTables, Skew, merged
from kvarn.cost.profile_table import ProfileTable
from kvarn.cost.rows import of_row, to_row
from kvarn.cost.shape import StepShape
from kvarn.cost.tables import families, from_table
from kvarn.cost.token_tables import TokenTables

TRACES = Path(os.environ.get("KVARN_TRACES", Path(__file__).parents[3] / "shared" / "traces"))
PERF = TRACES / "perf"
measured = pytest.mark.skipif(not PERF.is_dir(), reason="no measured tables on this machine")

LLAMA_8B = ModelSpec("llama", "Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, 131072)
H100 = "aic_h100_sxm_vllm0.24_"
DECODE = StepShape((), 32, 32 * 4096, 4096, 32)
PREFILL = StepShape(((2048, 2048),), n_logits=1)
MIXED = StepShape(((512, 1536),), 16, 16 * 1024, 2048, 17)


def write(path: Path, names: str, rows: list[tuple[Any, ...]]) -> None:
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names.split(","))
        writer.writerows(rows)


# kernels


@pytest.fixture(scope="module")
def h100() -> KernelTables:
    return KernelTables(PERF, H100, LLAMA_8B)


@measured
def test_a_decode_step_lies_between_its_bytes_and_twice_them(h100: KernelTables) -> None:
    moved = 2 * (LLAMA_8B.n_params() - LLAMA_8B.vocab * LLAMA_8B.hidden)
    kv = sum(group.bytes_per_token(2) for group in LLAMA_8B.groups()) * DECODE.decode_sum
    least = (moved + kv) / h100.peak.bandwidth
    out = h100.step(DECODE)
    assert least < out.seconds < 2 * least
    assert out.decode > kv / h100.peak.bandwidth
    assert 0.8 < out.confidence < 1
    assert out.joules == 0 and h100.idle_watts() == 0


@measured
def test_a_prefill_lies_between_its_operations_and_twice_them(h100: KernelTables) -> None:
    work = 2 * 2048 * (LLAMA_8B.n_params() - 2 * LLAMA_8B.vocab * LLAMA_8B.hidden)
    least = work / h100.peak.flops
    assert least < h100.step(PREFILL).seconds < 2 * least


@measured
def test_more_work_takes_longer(h100: KernelTables) -> None:
    by_context = [h100.step(StepShape((), 8, 8 * n, n, 8)).decode for n in (512, 4096, 16384)]
    assert by_context == sorted(by_context)
    by_past = [
        h100.step(
            StepShape(
                ((512, 512 + past),),
            )
        ).prefill
        for past in (0, 2048, 8192)
    ]
    assert by_past == sorted(by_past)
    uneven = replace(DECODE, decode_max=16384)
    assert h100.step(uneven).decode > h100.step(DECODE).decode


@measured
def test_beyond_the_tables_the_estimate_says_so(h100: KernelTables) -> None:
    far = h100.step(StepShape((), 32, 32 * 120000, 120000, 32))
    near = h100.step(StepShape((), 32, 32 * 16000, 16000, 32))
    assert far.confidence < 0.5 < near.confidence
    assert far.decode == pytest.approx(near.decode * 120000 / 16000, rel=0.15)


@measured
def test_two_ranks_halve_the_products_and_talk() -> None:
    one, two = KernelTables(PERF, H100, LLAMA_8B), KernelTables(PERF, H100, LLAMA_8B, tp=2)
    a, b = one.step(PREFILL), two.step(PREFILL)
    assert a.comm == 0 < b.comm
    assert 0.45 < b.linear / a.linear < 0.65
    with pytest.raises(ConfigError, match="does not divide"):
        KernelTables(PERF, H100, LLAMA_8B, tp=3)
    with pytest.raises(ConfigError, match="all-reduce over 16 GPUs"):
        KernelTables(PERF, H100, LLAMA_8B, tp=16)


@measured
def test_heads_that_were_not_measured_take_the_nearest_and_are_no_measurement() -> None:
    odd = replace(LLAMA_8B, n_heads=36, n_kv_heads=9)
    out = KernelTables(PERF, H100, odd).step(DECODE)
    usual = KernelTables(PERF, H100, LLAMA_8B).step(DECODE)
    assert out.decode == pytest.approx(usual.decode * 9 / 8, rel=0.05)
    assert out.confidence < usual.confidence - 0.3
    with pytest.raises(ConfigError, match="heads 80 wide"):
        KernelTables(PERF, H100, replace(LLAMA_8B, head_dim=80))


@measured
def test_host_and_power_are_what_was_given() -> None:
    given = {"host": 1e-3, "host_per_seq": 1e-5, "busy_watts": 700.0, "idle_watts": 80.0}
    model = KernelTables(PERF, H100, LLAMA_8B, **given)
    out = model.step(DECODE)
    assert out.host == pytest.approx(1e-3 + 32e-5)
    assert out.joules == pytest.approx(700 * out.seconds)
    assert model.idle_watts() == 80


@measured
def test_a_window_bounds_what_decodes_read() -> None:
    local = replace(LLAMA_8B, windows=(1024,) * 32)
    at = KernelTables(PERF, H100, local).step(DECODE).decode
    assert at == pytest.approx(
        KernelTables(PERF, H100, LLAMA_8B).step(StepShape((), 32, 32 * 1024, 1024, 32)).decode
    )


@measured
def test_a_decode_step_costs_microseconds(h100: KernelTables) -> None:
    best = min(timeit.repeat(lambda: h100.step(DECODE), number=500, repeat=5)) / 500
    assert best < 60e-6, f"{best * 1e6:.1f} us a step"  # loose: cores are shared


def test_pairs_of_a_window_are_counted() -> None:
    for rows, context, window in ((5, 5, 3), (4, 20, 6), (7, 9, 4), (3, 3, 8)):
        seen = sum(min(p + 1, window) for p in range(context - rows, context))
        assert pairs(rows, context, window) == seen


# leave one out: the source's own figures are 4.9 % (p90 15.6 %) for products, 2-3 % for prefill
# attention (AIConfigurator's documentation of its databases)


def left_out(grid: Grid, n: int) -> tuple[float, float]:
    """(median, p90) of |predicted / measured - 1| over points that have neighbours."""
    points = grid.points()
    chosen = random.Random(0).sample(sorted(points), min(n, len(points)))
    guesses = [(grid.without(*point), points[point]) for point in chosen]
    off = sorted(abs(guess / seconds - 1) for guess, seconds in guesses if guess is not None)
    return statistics.median(off), off[int(0.9 * len(off))]


@measured
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (0, 2, 1)], ids=["by m", "by n", "by k"])
def test_products_left_out_are_met(axes: tuple[int, int, int]) -> None:
    grid = gemm_grid(PERF / f"{H100}gemm_perf.csv.gz", "bfloat16", read_peak(PERF, H100, "fp8"))
    points = [(tuple(p[i] for i in axes), t) for p, t in grid.points().items()]
    median, p90 = left_out(Grid("permuted", grid.axes, points, lambda p: 1.0), 1500)
    assert median < 0.06 and p90 < 0.20, f"median {median:.1%}, p90 {p90:.1%}"


@measured
@pytest.mark.parametrize("kind", ["context", "generation"])
def test_attention_left_out_is_met(kind: str) -> None:
    path = PERF / f"{H100}{kind}_attention_perf.csv.gz"
    peak = read_peak(PERF, H100, "bfloat16")
    grid, scale = attention_grid(path, (32, 8, 128), "bfloat16", peak, prefill=kind == "context")
    assert scale == 1.0
    median, p90 = left_out(grid, 500)
    assert median < 0.05 and p90 < 0.20, f"median {median:.1%}, p90 {p90:.1%}"


@measured
def test_experts_are_a_curve_over_tokens() -> None:
    path = PERF / f"{H100}moe_perf.csv.gz"
    grid = expert_grid(path, (2048, 768, 8, 128))
    assert grid.at(16384)[0] > grid.at(64)[0] > grid.at(1)[0] > 0
    with pytest.raises(ConfigError, match="no measured point"):
        expert_grid(path, (2048, 768, 8, 127))


# layers


@measured
@pytest.mark.parametrize("gpu", ["RTX4090", "RTXPRO6000"])
def test_layer_tables_price_steps(gpu: str) -> None:
    model = LayerTables(PERF, f"llmservingsim_{gpu}_llama31_8b_tp1_", LLAMA_8B)
    decode, prefill, mixed = model.step(DECODE), model.step(PREFILL), model.step(MIXED)
    assert decode.prefill == 0 and decode.confidence == pytest.approx(1.0)
    assert prefill.decode == 0 and prefill.confidence == pytest.approx(1.0)
    assert mixed.prefill > 0 and mixed.decode > 0
    assert 0.005 < decode.seconds < prefill.seconds < 0.3
    even = model.step(replace(DECODE, decode_max=4096))
    uneven = model.step(replace(DECODE, decode_max=16384))
    longest = model.step(StepShape((), 32, 32 * 16384, 16384, 32))
    # a few fitted alphas are slightly below 0
    assert 0.97 * even.decode < uneven.decode < 0.9 * longest.decode


@measured
def test_layer_tables_belong_to_their_model() -> None:
    with pytest.raises(ConfigError, match="measured with a model of"):
        from_table(PERF, replace(LLAMA_8B, n_layers=30), device="RTX4090")
    with pytest.raises(ConfigError, match="not measured with tp=2"):
        from_table(PERF, LLAMA_8B, device="RTX4090", tp=2)


def test_chunks_are_merged_without_changing_their_work() -> None:
    def work(rows: float, past: float) -> float:
        return rows * (past + rows / 2)

    for chunks in (((100, 900), (50, 60)), ((64, 64),) * 8, ((16, 8000), (16, 16))):
        rows, past = merged(chunks)
        assert past >= 0
        assert work(rows, past) == pytest.approx(sum(work(r, c - r) for r, c in chunks))
    assert merged(((100, 900),)) == (100, 800)


def test_the_skew_takes_its_bucket_or_the_median(tmp_path: Path) -> None:
    path = tmp_path / "skew_fit.csv.gz"
    names = "pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples"
    rows = [
        (0, "n<=8", "sr<=40%", "kvB<=4k", "kp=0", 0.1, 4),
        (0, "n<=8", "sr>70%", "kvB<=4k", "kp=0", 0.5, 4),
        (16, "n<=2", "sr>70%", "kvB<=16k", "kp<=1k", 0.9, 4),
    ]
    write(path, names, rows)
    skew = Skew(path)
    assert skew.alpha(0, 8, 0.3, 4000, 0) == 0.1
    assert skew.alpha(0, 5, 0.9, 4096, 0) == 0.5
    assert skew.alpha(0, 1, 0.9, 4096, 0) == pytest.approx(0.3)
    assert skew.alpha(9, 2, 0.9, 9000, 700) == 0.9


# phases


@measured
def test_phases_by_tokens() -> None:
    path = PERF / "splitwise_perf_model.csv.gz"
    model = from_table(path, LLAMA_8B, device="llama2-70b/h100-80gb", tp=8)
    assert isinstance(model, TokenTables)
    prompt = model.step(StepShape(((512, 512),)))
    mixed = model.step(StepShape(((512 - 4, 508),), 4, 2000, 500, 5))
    assert mixed.seconds == pytest.approx(1.1 * prompt.seconds)
    a100 = from_table(path, LLAMA_8B, device="llama2-70b/a100-80gb", tp=8)
    assert prompt.seconds < a100.step(StepShape(((512, 512),))).seconds
    with pytest.raises(ConfigError, match="it has"):
        from_table(path, LLAMA_8B, device="llama2-70b/tpu", tp=8)
    with pytest.raises(ConfigError, match="needs a device"):
        from_table(path, LLAMA_8B, device="h100")


# kvarn's own profile


def profile(spec: ModelSpec = LLAMA_8B) -> dict[str, Any]:
    """A made-up machine: 10 ms a step, 1 ms a row, 1 us a position; parts share the 10 ms."""

    def row(shape: StepShape) -> dict[str, Any]:
        work = sum(r * (c - r / 2) for r, c in shape.chunks) + shape.decode_sum
        return to_row(shape, 0.01 + 0.001 * shape.n_tokens + 1e-6 * work)

    decodes = [StepShape((), n, n * c, c, n) for n in (1, 4, 16) for c in (1, 1000)]
    chunks = [StepShape(((r, r + past),), n_logits=1) for r in (2, 64) for past in (0, 1000)]
    mixed = [StepShape(((64, 64),), 4, 4000, 1000, 5), StepShape(((2, 2),), 16, 16, 1, 17)]
    rows = [row(shape) for shape in (*decodes, *chunks, *mixed)]
    return {"spec": json.loads(json.dumps(asdict(spec))), "pages": [100], "rows": rows}


def test_a_profile_prices_pure_and_mixed_steps(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile()))
    model = from_table(path, LLAMA_8B)
    assert isinstance(model, ProfileTable)
    assert model.pages == [100]
    assert model.beta == pytest.approx(0.9, abs=0.05)  # the shared 10 ms of the 11 ms floor
    for shape, seconds in map(of_row, profile()["rows"]):
        out = model.step(shape)
        assert out.seconds == pytest.approx(seconds, rel=0.03)
        assert out.confidence == 1.0
    new = StepShape(((64, 64), (64, 64)), 4, 4000, 1000, 6)
    assert model.step(new).seconds == pytest.approx(0.01 + 0.132 + 1e-6 * (4096 + 4000), rel=0.05)
    assert model.step(StepShape((), 64, 640, 10, 64)).confidence == 0


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile(replace(LLAMA_8B, hidden=64))))
    with pytest.raises(ConfigError, match="hidden is 64"):
        from_table(path, LLAMA_8B)
    path.write_text(json.dumps(profile()))
    with pytest.raises(ConfigError, match="tp=1, not 2"):
        from_table(path, LLAMA_8B, tp=2)
    with pytest.raises(ConfigError, match=r"cannot honour.*skew"):
        from_table(path, LLAMA_8B, skew=0.5)


# what a path holds


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no tables"):
        from_table(tmp_path, LLAMA_8B)
    with pytest.raises(ConfigError, match="cannot read"):
        from_table(tmp_path / "none.json", LLAMA_8B)
    (tmp_path / "text").write_text("no json")
    with pytest.raises(ConfigError, match="neither a folder"):
        from_table(tmp_path / "text", LLAMA_8B)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ConfigError, match="no profile"):
        from_table(tmp_path / "list.json", LLAMA_8B)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match="no 'spec'"):
        from_table(tmp_path / "other.json", LLAMA_8B)


@measured
def test_a_folder_names_its_families() -> None:
    assert H100 in families(PERF)
    assert from_table(PERF, LLAMA_8B, device="h100").name == f"{H100}tp1"
    with pytest.raises(ConfigError, match="several tables fit"):
        from_table(PERF, LLAMA_8B, device="aic")
    with pytest.raises(ConfigError, match="no tables of 'tpu'"):
        from_table(PERF, LLAMA_8B, device="tpu")
