"""`kvarn sim --find`: searches with a known answer, and answers that simulations confirm."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvarn.bench import capacity, probes, sim
from kvarn.bench.options import Fleet, Search, Traffic, Workload
from kvarn.bench.probes import Probe
from kvarn.cli import main
from kvarn.cli_sim import capacity_lines
from kvarn.core.errors import ConfigError

ROWS = [
    {"timestamp": 100 * i + 30 * (i % 3), "input_length": 3100 + 90 * (i % 5),
     "output_length": 60 + i % 7, "hash_ids": [1000 + 9 * i + j for j in range(7)]}
    for i in range(120)
]  # fmt: skip
WORK = Workload(num_prompts=120, input_len=1024, output_len=64)
TRAFFIC = Traffic(goodput=("ttft:150 tpot:15",))


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def share(found: sim.Simulated) -> float:
    return found.result["attainment"]


# the searches alone


@pytest.mark.parametrize("limit", [0.002, 0.7, 1.0, 37.2, 5000.0])
def test_the_bracket_holds_the_limit_within_the_tolerance(limit):
    asked = []

    def probe(rate: float) -> Probe:
        asked.append(rate)
        return Probe(rate, rate <= limit, {})

    found = probes.highest_rate(probe, 3.0, 0.01)
    assert found.highest.at <= limit < found.lowest.at <= found.highest.at * 1.01
    assert [one.at for one in found.curve] == sorted(asked)
    assert len(asked) == len(set(asked)), "no rate is simulated twice"


def test_a_limit_beyond_all_rates_is_said_and_not_made_up():
    every = probes.highest_rate(lambda rate: Probe(rate, True, {}), 1.0, 0.01)
    assert every.lowest is None and every.highest.at == 2.0**probes.MOST_STEPS
    none = probes.highest_rate(lambda rate: Probe(rate, False, {}), 1.0, 0.01)
    assert none.highest is None and none.lowest.at == 2.0**-probes.MOST_STEPS


@pytest.mark.parametrize("need", [1, 2, 3, 7, 8, 9, 20])
def test_the_fewest_instances(need):
    best, curve = probes.fewest(lambda n: Probe(n, n >= need, {}), 20)
    assert best.at == need
    assert [one.at for one in curve] == sorted({one.at for one in curve})


def test_the_most_that_may_be_tried_is_kept():
    best, curve = probes.fewest(lambda n: Probe(n, n >= 7, {}), 6)
    assert best is None and curve[-1].at == 6


# rate


def test_simulations_confirm_the_rate_of_a_data_set():
    fleet, wanted = Fleet(), Search(find="rate", tolerance=0.05)
    answer = capacity.search(fleet, WORK, TRAFFIC, wanted)
    low, high = answer.report["bracket"]
    at = [share(sim.run(fleet, WORK, replace(TRAFFIC, request_rate=rate))) for rate in (low, high)]
    assert at[0] >= 0.99 > at[1]
    assert low < high <= low * 1.05
    assert answer.report["simulations"] == len(answer.report["curve"])
    assert answer.traffic.request_rate == low and answer.attained


def test_simulations_confirm_the_rate_of_a_recorded_trace(trace):
    traffic = replace(TRAFFIC, trace=trace)
    answer = capacity.search(Fleet(), WORK, traffic, Search(find="rate", attain=0.9))
    low, high = answer.report["bracket"]
    own = len(ROWS) / (ROWS[-1]["timestamp"] - ROWS[0]["timestamp"]) * 1000
    for rate, attains in ((low, True), (high, False)):
        found = sim.run(Fleet(), replace(WORK, speed=rate / own), traffic)
        assert (share(found) >= 0.9) is attains
    assert answer.trace.chain[-1].startswith("time_warp(")
    assert len(answer.trace) / answer.trace.span == pytest.approx(low)


def test_refused_requests_do_not_attain(trace):
    """A queue of one: who is served is served in time, so the refused alone set the limit."""
    fleet = Fleet(max_seqs=1, max_queue=1)
    easy = replace(TRAFFIC, trace=trace, goodput=("e2el:1e9",))
    answer = capacity.search(fleet, WORK, easy, Search(find="rate"))
    worst = answer.report["curve"][-1]
    assert worst["failed"] > 0
    assert worst["attainment"] == pytest.approx(worst["completed"] / len(ROWS))
    assert not worst["attained"] and answer.attained


def test_generators_scale_their_sessions():
    work, traffic = replace(WORK, num_prompts=40), replace(TRAFFIC, trace="synthetic-multi-turn")
    answer = capacity.search(Fleet(), work, traffic, Search(find="rate", tolerance=0.5))
    assert answer.report["unit"] == "sessions/s"
    assert f"rate={answer.report['rate']}" in answer.trace.chain[0]


def test_what_no_rate_attains_is_said(tmp_path, capsys):
    out = tmp_path / "result.json"
    words = ["sim", "--find", "rate", "--num-prompts", "5", "--goodput", "ttft:0.001"]
    assert main([*words, "--json", str(out)]) == 1
    assert "no rate attains ttft <= 0.001 ms" in capsys.readouterr().out
    found = json.loads(out.read_text())["capacity"]
    assert found["rate"] is None and found["bracket"][0] is None


def test_a_load_too_short_for_a_limit_is_said(capsys):
    words = ["sim", "--find", "rate", "--num-prompts", "3", "--goodput", "ttft:5000"]
    assert main(words) == 0
    assert "the load is too short" in capsys.readouterr().out


# fleet


def test_the_cheapest_fleet_is_what_brute_force_finds(trace):
    traffic = replace(TRAFFIC, trace=trace)
    work = replace(WORK, speed=6.0)
    fleet = Fleet(router="least_loaded")
    answer = capacity.search(fleet, work, traffic, Search(find="fleet", max_instances=12))
    seen = [
        share(sim.run(replace(fleet, instances=n), work, traffic)) >= 0.99 for n in range(1, 13)
    ]
    assert answer.report["fleet"]["instances"] == seen.index(True) + 1 > 1
    assert answer.fleet.instances == seen.index(True) + 1


def test_devices_that_cannot_serve_are_listed_with_the_reason(trace):
    traffic, wanted = replace(TRAFFIC, trace=trace), Search(
        find="fleet", try_device=("H100,T4", "L4"), try_tp=(1, 3), max_instances=4
    )  # fmt: skip
    answer = capacity.search(Fleet(), WORK, traffic, wanted)
    rows = {(one["device"], one["tp"]): one for one in answer.report["candidates"]}
    assert len(rows) == 6
    assert "does not multiply in bf16" in rows["T4", 1]["reason"]
    assert "tp=3 does not divide" in rows["H100", 3]["reason"]
    assert "instances attain for" in rows["L4", 1]["reason"] and rows["L4", 1]["curve"]
    assert answer.report["fleet"]["device"] == "H100"
    lines = "\n".join(capacity_lines(answer.report))
    assert "cheapest fleet" in lines and "T4, tp=1: device 't4'" in lines


def test_fewer_devices_win_and_then_less_energy(trace):
    traffic = replace(TRAFFIC, trace=trace, goodput=("ttft:5000",))
    wanted = Search(find="fleet", try_device=("L40S", "H200", "H100"), try_tp=(1, 2))
    report = capacity.search(Fleet(), replace(WORK, speed=0.2), traffic, wanted).report
    able = [one for one in report["candidates"] if one["instances"]]
    best = min(able, key=lambda one: (one["instances"] * one["tp"], one["energy_j"]))
    assert report["fleet"] == {name: best[name] for name in ("device", "tp", "instances")}
    assert sum(one["devices"] == best["devices"] for one in able) > 1, "energy had to decide"


# errors


@pytest.mark.parametrize(
    "words, says",
    [
        (["--find", "rate"], "needs targets"),
        (["--find", "rates", "--goodput", "ttft:500"], "rate"),
        (["--find", "rate", "--goodput", "ttft:500", "--attain", "0"], "attain must be in (0, 1]"),
        (["--find", "rate", "--goodput", "ttft:500", "--attain", "1.5"], "0.99 is 99 %"),
        (["--find", "rate", "--goodput", "ttft:500", "--tolerance", "0"], "tolerance"),
        (["--find", "rate", "--goodput", "ttft:500", "--try-tp", "1,2"], "belong to --find fleet"),
        (["--find", "rate", "--goodput", "tfft:500"], "ttft"),
        (["--find", "fleet", "--goodput", "ttft:500", "--try-device", "H1000"], "H100"),
        (["--find", "fleet", "--goodput", "ttft:500", "--max-instances", "0"], "at least 1"),
        (["--find", "fleet", "--goodput", "ttft:500", "--pages", "9", "--try-tp", "1,2"], "leave"),
        (["--find", "fleet", "--goodput", "ttft:500", "--model", "llama-3.1-70b", "--device", "L4"],
         "no fleet holds the model"),
        (["--attain", "0.9", "--goodput", "ttft:500"], "--find rate or --find fleet"),
    ],
)  # fmt: skip
def test_questions_without_an_answer_are_refused(words, says, capsys):
    assert main(["sim", "--num-prompts", "4", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_trace_without_times_has_no_rate(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row | {"timestamp": 0}) + "\n" for row in ROWS[:3]))
    with pytest.raises(ConfigError, match="arrive at one time"):
        capacity.search(Fleet(), WORK, replace(TRAFFIC, trace=str(path)), Search(find="rate"))


# prices


def test_prices_make_the_cheapest_fleet_another_one(trace):
    """Two devices at a price each: which wins turns with the prices, and the sums are right."""
    traffic = replace(TRAFFIC, trace=trace, goodput=("ttft:5000",))
    work, wanted = replace(WORK, speed=0.2), Search(find="fleet", try_device=("L40S,H200",))
    for paid, wins in (
        ({"l40s": 1.0, "h200": 100.0}, "L40S"), ({"l40s": 100.0, "h200": 1.0}, "H200")
    ):  # fmt: skip
        answer = capacity.search(Fleet(), work, traffic, wanted, paid)
        report = answer.report
        assert report["fleet"]["device"] == wins and report["cheapest_by"][0] == "cost_per_hour"
        for one in report["candidates"]:
            hour = one["instances"] * paid[one["device"].lower()]
            assert one["cost_per_hour"] == hour
        done = sim.measured(answer.fleet, work, traffic, answer.trace).result
        best = min(report["candidates"], key=lambda one: one["cost_per_hour"])
        spent = best["cost_per_hour"] * done["duration"] / 3600
        each = spent / done["total_output_tokens"] * 1e6
        assert best["cost_per_million_output_tokens"] == pytest.approx(each)
        lines = "\n".join(capacity_lines(report))
        assert "by price, then energy" in lines and f"{hour:.4g} per hour" in lines


def test_a_fleet_that_was_given_has_its_cost(tmp_path, capsys):
    out = tmp_path / "result.json"
    words = ["sim", "--num-prompts", "5", "--instances", "3", "--price", "H100=2.5,T4=0.35"]
    assert main([*words, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["cost_per_hour"] == 7.5
    assert found["cost_per_million_output_tokens"] == pytest.approx(
        7.5 / 3600 / found["output_throughput"] * 1e6
    )
    assert "costs 7.5 per hour" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["--price", "h100"], "as in h100=2.5, not 'h100'"),
        (["--price", "h100=free"], "not 'h100=free'"),
        (["--price", "h100=-1"], "not 'h100=-1'"),
        (["--price", "h100=nan"], "not 'h100=nan'"),
        (["--price", "h1000=2"], "h100"),
        (["--price", "h100=2,H100=3"], "twice"),
        (["--price", "t4=0.35"], "no price of H100 was given (t4)"),
        (["--find", "fleet", "--goodput", "ttft:500", "--try-device", "H100,L4", "--price",
          "h100=2.5"], "add --price l4=..."),
    ],
)  # fmt: skip
def test_prices_that_say_nothing_are_refused(words, says, capsys):
    assert main(["sim", "--num-prompts", "4", *words]) == 2
    assert says in capsys.readouterr().err
