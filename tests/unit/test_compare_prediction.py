"""`kvarn bench compare` of a simulation with measurements: errors, spreads and limits by hand."""

import json

import pytest

from kvarn.bench import compare
from kvarn.cli import main
from kvarn.core.errors import ConfigError

LOAD = {"dataset": "random", "num_prompts": 10, "request_rate": 2.0, "burstiness": 1.0}
MEASURED = {
    "bench": "serve", "workload": LOAD | {"max_concurrency": None, "backend": "openai"},
    "num_prompts": 10, "model_id": "m", "mean_ttft_ms": 100.0, "mean_tpot_ms": 10.0,
    "output_throughput": 50.0, "p99_ttft_ms": 200.0, "p99_tpot_ms": 20.0,
    "total_output_tokens": 80,
}  # fmt: skip
SIMULATED = MEASURED | {
    "bench": "sim", "workload": LOAD | {"trace": "synthetic-random", "requests": 10},
    "mean_ttft_ms": 108.0, "mean_tpot_ms": 10.6, "output_throughput": 49.0, "p99_ttft_ms": 240.0,
    "p99_tpot_ms": 20.0,
}  # fmt: skip


def rows(*real, guess=SIMULATED):
    return {row.name: row for row in compare.judged(guess, real)}


def test_errors_limits_and_spread_by_hand():
    found = rows(MEASURED | {"mean_ttft_ms": 90.0}, MEASURED | {"mean_ttft_ms": 110.0})
    ttft, tpot = found["mean_ttft_ms"], found["mean_tpot_ms"]
    assert ttft.measured == 100.0 and ttft.error == pytest.approx(0.08)
    assert ttft.spread == pytest.approx(0.2) and ttft.inside and ttft.good
    assert tpot.error == pytest.approx(0.06) and tpot.spread == 0 and not tpot.inside
    assert not tpot.good
    assert found["output_throughput"].error == pytest.approx(-0.02)
    assert found["output_throughput"].good
    assert found["p99_ttft_ms"].error == pytest.approx(0.2) and not found["p99_ttft_ms"].good
    assert found["p99_tpot_ms"].inside and found["p99_tpot_ms"].error == 0


def test_one_run_has_no_spread():
    assert rows(MEASURED)["mean_ttft_ms"].spread is None
    assert rows(MEASURED)["mean_ttft_ms"].inside is None


def test_bars_of_a_policies_result_are_kept():
    values = {"mean_ttft_ms": 108.0}
    drawn = [{"mean_ttft_ms": 100.0 + i} for i in range(21)]
    guess = {"bench": "policies", "nominal": [values], "drawn": [drawn]}
    (row,) = rows(MEASURED, guess=guess).values()
    assert row.bars == (pytest.approx(101.0), pytest.approx(119.0))
    assert "[101, 119]" in "\n".join(compare.prediction_lines([row], 1))


def test_missing_measures_are_named():
    without = {key: value for key, value in MEASURED.items() if key != "p99_ttft_ms"}
    with pytest.raises(ConfigError, match=r"measurement 2 holds no p99_ttft_ms; run it with"):
        compare.judged(SIMULATED, [MEASURED, without])
    with pytest.raises(ConfigError, match="the simulation holds no mean_ttft_ms"):
        compare.judged({"bench": "sim"}, [MEASURED])
    with pytest.raises(ConfigError, match="measured as 0"):
        compare.judged(SIMULATED, [MEASURED | {"mean_tpot_ms": 0}])


def test_workloads_are_compared_where_both_speak():
    assert compare.unlike(SIMULATED, [MEASURED, MEASURED]) == []
    slow = MEASURED | {"workload": MEASURED["workload"] | {"request_rate": 1.0}}
    assert compare.unlike(SIMULATED, [slow]) == ["request_rate: 2.0 (simulated) and 1.0 (measured)"]
    assert compare.unlike(SIMULATED, [MEASURED, slow]) == ["request_rate: 2.0 and 1.0"]
    closed = MEASURED | {"workload": MEASURED["workload"] | {"max_concurrency": 4}}
    assert compare.unlike(SIMULATED, [closed]) == [
        "max_concurrency: none (simulated) and 4 (measured)"
    ]
    traced = SIMULATED | {"workload": {"trace": "t", "requests": 9}, "total_output_tokens": 70}
    assert compare.unlike(traced, [MEASURED]) == [
        "requests: 9 (simulated) and 10 (measured)",
        "total_output_tokens: 70 (simulated) and 80 (measured)",
    ]


def test_what_is_compared_with_what():
    assert compare.split([MEASURED, MEASURED]) is None
    assert compare.split([SIMULATED, SIMULATED]) is None
    assert compare.split([MEASURED, SIMULATED, MEASURED]) == (SIMULATED, [MEASURED, MEASURED])
    with pytest.raises(ConfigError, match="not 2"):
        compare.split([SIMULATED, SIMULATED, MEASURED])
    with pytest.raises(ConfigError, match="bench offline"):
        compare.split([SIMULATED, {"bench": "offline"}])
    with pytest.raises(ConfigError, match="at least one measurement"):
        compare.split([SIMULATED])


def test_command(tmp_path, capsys):
    paths = []
    for name, found in (("sim", SIMULATED), ("r1", MEASURED), ("r2", MEASURED)):
        paths.append(str(tmp_path / f"{name}.json"))
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert main(["bench", "compare", *paths]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("mean_tpot_ms"))
    assert line.split()[1:] == ["10.6", "10", "+6.0%", "0.0%", "no", "5%", "fail"]
    assert "means of 2 measured runs" in said
    assert main(["bench", "compare", *paths[1:], paths[1]]) != 0
    assert "two results, or a simulation" in capsys.readouterr().err
    (tmp_path / "sim.json").write_text(json.dumps(SIMULATED | {"workload": {"requests": 3}}))
    assert main(["bench", "compare", *paths]) == 1
    assert "requests: 3 (simulated)" in capsys.readouterr().err
