"""Error bars on ratios of policies: verdicts by hand, the same draws for all, residuals."""

import json
import math
import random
from dataclasses import replace
from statistics import fmean

import pytest

from kvarn.bench import error_bars, residuals, sim, sim_fleet
from kvarn.bench.error_bars import Draws, gain, judge, varied
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.bench.sim_load import find_trace
from kvarn.cli import main
from kvarn.core.errors import ConfigError
from kvarn.cost.perturb import TERMS, draws

WORK = Workload(num_prompts=24, input_len=600, output_len=12, seed=5)
TRAFFIC = Traffic(request_rate=30.0)
STEPS = {"all": {"mape": 0.1}, "decode-only": {"mape": 0.05}, "prefill-only": {"mape": 0.2}}


@pytest.fixture
def validation(tmp_path):
    path = tmp_path / "t2.json"
    path.write_text(json.dumps({"date": "20260101-000000", "steps": STEPS}))
    return str(path)


def test_gain_is_above_one_for_the_better_policy():
    assert gain("mean_ttft_ms", 50.0, 100.0) == 2.0
    assert gain("output_throughput", 50.0, 100.0) == 0.5
    assert gain("prefix_hit_rate", 0.0, 0.0) == 1.0
    assert gain("prefix_hit_rate", 0.5, 0.0) is None
    assert gain("mean_ttft_ms", 0.0, 3.0) is None


def test_only_a_fifth_percentile_above_one_decides():
    even = [1 + i / 20 for i in range(21)]  # 1.00, 1.05 ... 2.00
    low, high, verdict = judge(even)
    assert (low, high, verdict) == (pytest.approx(1.05), pytest.approx(1.95), "better")
    assert judge([ratio - 0.06 for ratio in even])[2] == "not decided"
    assert judge([1 / ratio for ratio in even])[2] == "worse"
    assert judge([1.0] * 30) == (1.0, 1.0, "not decided")
    assert judge([2.0, None]) == (None, None, "no ratio")
    with pytest.raises(ConfigError, match="at least one draw"):
        judge([])


def test_equal_policies_have_ratio_one_in_every_draw(validation):
    how = Draws(n=4, seed=1, residuals=validation)
    fleet = Fleet(instances=2)
    spec, trace = sim_fleet.find_spec(fleet.model), find_trace(WORK, TRAFFIC)
    found = error_bars.compare(
        {"one": fleet, "again": replace(fleet)},
        lambda one: sim_fleet.price_list(one, spec),
        draws(residuals.read(validation).sigma, how.n, how.seed),
        error_bars.simulator(trace),
    )
    assert len(found.claims) == len(error_bars.MEASURES)
    for claim in found.claims:
        assert claim.ratios == [1.0] * 4 and claim.nominal == 1.0
        assert claim.verdict == "not decided"


def test_twice_the_instances_are_decided_and_the_seed_decides_the_draws(validation):
    how = Draws(n=6, seed=3, residuals=validation)
    one = error_bars.run(Fleet(), WORK, TRAFFIC, "instances=1,2", how)
    ttft = next(row for row in one["claims"] if row["measure"] == "mean_ttft_ms")
    assert ttft["verdict"] == "better" and ttft["p5"] > 1 and ttft["policy"] == "instances=2"
    assert min(ttft["ratios"]) <= ttft["p5"] <= ttft["p95"] <= max(ttft["ratios"])
    assert len({row["mean_ttft_ms"] for row in one["drawn"][0]}) == 6
    again = error_bars.run(Fleet(), WORK, TRAFFIC, "instances=1,2", how)
    assert one["claims"] == again["claims"]
    other = error_bars.run(Fleet(), WORK, TRAFFIC, "instances=1,2", replace(how, seed=4))
    assert one["claims"] != other["claims"] and one["nominal"] == other["nominal"]
    swapped = error_bars.run(Fleet(), WORK, TRAFFIC, "instances=2,1", how)
    assert swapped["drawn"] == one["drawn"][::-1]
    assert swapped["claims"][0]["verdict"] == "worse"


def test_policies_may_differ_in_their_model(validation):
    how = Draws(n=2, residuals=validation)
    found = error_bars.run(Fleet(tp=4), WORK, TRAFFIC, "model=llama-3.1-8b,llama-3.1-70b", how)
    assert found["claims"][0]["verdict"] == "worse"


def test_every_policy_meets_the_same_factors():
    seen: dict[str, list[dict[str, float]]] = {"round_robin": [], "least_loaded": []}

    def simulate(fleet, cost):
        seen[fleet.router].append(getattr(cost, "factors", None))
        return dict.fromkeys(error_bars.MEASURES, 1.0)

    spec, factors = sim_fleet.find_spec("llama-3.1-8b"), draws({"decode": 0.3}, 5, 7)
    fleets = varied(Fleet(), "router=round_robin,least_loaded")
    error_bars.compare(fleets, lambda one: sim_fleet.price_list(one, spec), factors, simulate)
    assert seen["round_robin"] == seen["least_loaded"] == [None, *factors]


def test_measures_are_those_of_kvarn_sim():
    fleet = Fleet(instances=2)
    done = sim.run(fleet, WORK, TRAFFIC)
    for name, value in error_bars.measures(done.outcome).items():
        assert value == pytest.approx(done.result[name], rel=1e-9), name


def test_refused_requests_forbid_a_comparison():
    done = sim.run(Fleet(max_queue=1, max_seqs=1), WORK, Traffic())
    with pytest.raises(ConfigError, match="were not served"):
        error_bars.measures(done.outcome)


def test_varied_fleets_keep_the_order_and_say_what_is_wrong():
    found = varied(Fleet(model="m"), "max-seqs=8,16")
    assert [(name, one.max_seqs, one.model) for name, one in found.items()] == [
        ("max_seqs=8", 8, "m"), ("max_seqs=16", 16, "m"),
    ]  # fmt: skip
    for said, why in (
        ("router", "FIELD=VALUE"), ("rooter=a,b", "router"), ("router=a", "at least two"),
        ("router=a,a", "at least two"), ("pages=1,x", "whole number"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=why):
            varied(Fleet(), said)


def test_sigma_of_a_mean_absolute_error_is_that_of_the_lognormal():
    rng = random.Random(0)
    for sigma in (0.05, 0.3, 0.8):
        mape = fmean(abs(rng.lognormvariate(0.0, sigma) - 1) for _ in range(100_000))
        assert residuals.sigma_of(mape) == pytest.approx(sigma, rel=0.02)
    assert residuals.sigma_of(0.0) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ConfigError, match="mean absolute error"):
        residuals.sigma_of(-0.1)


def test_steps_give_sigmas_by_regime(validation):
    found = residuals.read(validation)
    assert found.sigma["decode"] == residuals.sigma_of(0.05)
    assert found.sigma["prefill"] == residuals.sigma_of(0.2)
    assert {found.sigma[term] for term in TERMS if term not in ("decode", "prefill")} == {
        residuals.sigma_of(0.1)
    }
    assert found.source == "t2.json of 20260101-000000: errors of single steps"


def test_a_handful_of_steps_says_nothing_of_others():
    steps = {"all": {"n": 900, "mape": 0.04}, "mixed": {"n": 90, "mape": 0.08}}
    found = residuals.of_steps(steps | {"prefill-only": {"n": 1, "mape": 0.5}}, "t2.json")
    assert found["prefill"] == residuals.sigma_of(0.08)


def test_without_a_file_the_device_decides_which_validation_counts():
    for device, file in (("H100", "sim_h100"), ("CPU", "sim_cpu"), ("L40S", "sim_validation")):
        assert residuals.read(None, device).source.startswith(f"{file}.json of ")


def test_mixed_steps_stand_for_missing_prefill_only_ones():
    steps = {"all": {"mape": 0.1}, "mixed": {"mape": 0.3}}
    sigma = residuals.of_steps(steps, "x.json")
    assert sigma["prefill"] == residuals.sigma_of(0.3)
    assert sigma["decode"] == residuals.sigma_of(0.1)


def test_points_give_the_root_mean_square_of_logs(tmp_path):
    def point(tpot, ttft):
        return {"measured": {"tpot": tpot, "ttft": ttft}, "predicted": {"tpot": 1.0, "ttft": 1.0}}

    path = tmp_path / "points.json"
    path.write_text(json.dumps({"points": [point(math.e, 1.0), point(1 / math.e, math.e**2)]}))
    sigma = residuals.read(str(path)).sigma
    assert sigma["decode"] == pytest.approx(1.0)
    assert sigma["prefill"] == pytest.approx(math.sqrt(2.0))
    assert sigma["host"] == sigma["linear"] == pytest.approx(math.sqrt(6 / 4))


@pytest.mark.parametrize(
    ("text", "why"),
    [("{}", "neither"), ('{"steps": {"mixed": {}}}', "lacks 'all'"),
     ('{"points": []}', "no points"), ('{"points": [{"measured": {}}]}', "lacks a positive")],
)  # fmt: skip
def test_files_without_residuals_are_named(tmp_path, text, why):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why):
        residuals.read(str(path))


def test_command_prints_a_table_and_writes_json(tmp_path, validation, capsys):
    out = tmp_path / "out.json"
    words = ["--vary", "router=round_robin,least_loaded", "--instances", "2", "--draws", "2"]
    load = ["--num-prompts", "12", "--request-rate", "20", "--residuals", validation]
    assert main(["bench", "policies", *words, *load, "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert "[p5, p95]" in said and "baseline" in said and "t2.json" in said
    found = json.loads(out.read_text())
    assert found["bench"] == "policies" and len(found["drawn"]) == 2
    assert all(len(row["ratios"]) == 2 for row in found["claims"])
    assert set(found["sigma"]) == set(TERMS)
