"""`kvarn sim` from the command line: results under the names of `bench serve`, errors that help."""

import json
from pathlib import Path

import pytest

from kvarn.bench.options import Fleet
from kvarn.bench.sim_fleet import find_spec, overlaps, pages_by_formula
from kvarn.cli import main

ROWS = [
    {"timestamp": 900 * i, "input_length": 1200 + 40 * (i % 5), "output_length": 20 + i % 7,
     "hash_ids": [1, 2 + i % 3, 100 + i]}
    for i in range(40)
]  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def sim(tmp_path: Path, *words: str) -> dict:
    out = tmp_path / "result.json"
    assert main(["sim", "--json", str(out), *words]) == 0
    return json.loads(out.read_text())


def test_a_trace_gives_the_keys_of_bench_serve(tmp_path, trace, capsys):
    words = ["--trace", trace, "--model", "llama-3.1-8b", "--device", "H100"]
    found = sim(tmp_path, *words, "--instances", "2", "--router", "prefix_aware", "--bounds")
    serve_keys = {
        "completed", "failed", "duration", "total_input_tokens", "total_output_tokens",
        "request_throughput", "output_throughput", "mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms",
        "mean_itl_ms", "p99_itl_ms", "mean_e2el_ms", "workload", "config", "versions", "steady",
    }  # fmt: skip
    assert serve_keys <= found.keys()
    assert found["completed"] == 40 and found["failed"] == 0
    assert found["total_output_tokens"] == sum(row["output_length"] for row in ROWS)
    assert found["total_input_tokens"] == sum(row["input_length"] for row in ROWS)
    assert 0.3 < found["prefix_hit_rate"] < 0.9
    assert found["energy_j"] > 0 and found["preemptions"] == 0
    assert sum(found["requests_by_instance"]) == 40
    for name, row in found["bounds"].items():
        upper = name.endswith("per_s") or name.startswith("hit_rate")
        ratio = row["ratio"]
        assert ratio <= 1 + 1e-9 if upper else ratio >= 1 - 1e-9, name
    assert "prefix hits" in capsys.readouterr().out


def test_gaps_that_are_counted_agree_with_those_that_are_kept(tmp_path, trace, monkeypatch):
    kept = sim(tmp_path, "--trace", trace)
    monkeypatch.setattr("kvarn.bench.sim_fleet.MOST_GAPS", 100)
    counted = sim(tmp_path, "--trace", trace)
    for name in ("mean", "median", "p99"):
        assert counted[f"{name}_itl_ms"] == pytest.approx(kept[f"{name}_itl_ms"], abs=1e-3)
    assert kept["max_output_tokens_per_s"] > 20 and counted["max_output_tokens_per_s"] is None
    assert "counted" in counted["steady"]["why_empty"]
    assert counted["mean_ttft_ms"] == kept["mean_ttft_ms"]


def test_the_same_seed_gives_the_same_result(tmp_path):
    words = ["--dataset", "random", "--num-prompts", "30", "--request-rate", "20", "--seed", "3"]
    one, two = (sim(tmp_path, *words, "--instances", "2") for _ in range(2))
    for name in ("wall_seconds", "date"):
        one.pop(name), two.pop(name)
    assert one == two


def test_steps_can_be_seen_in_perfetto(tmp_path, trace):
    path = tmp_path / "steps.json"
    sim(tmp_path, "--trace", trace, "--limit", "5", "--perfetto", str(path))
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in steps} >= {"prefill", "decode"}
    ends = [event["ts"] + event["dur"] for event in steps]
    assert all(end <= later["ts"] + 1e-6 for end, later in zip(ends, steps[1:], strict=False))


def test_detailed_results_say_why_each_request_went_where(tmp_path, trace):
    found = sim(tmp_path, "--trace", trace, "--router", "least_loaded", "--detailed")
    assert len(found["ttfts"]) == len(found["routing"]) == 40
    assert all("fewest open" in why for _, why in found["routing"])


def test_more_memory_never_hits_less(tmp_path, trace):
    words = ["--trace", trace, "--max-seqs", "4"]
    few, many = (sim(tmp_path, *words, "--pages", pages) for pages in ("12", "400"))
    assert few["prefix_hit_rate"] <= many["prefix_hit_rate"]
    assert few["pages_source"] == "given"


@pytest.mark.parametrize(
    "words, says",
    [
        (["--model", "llama-3.1-70b", "--device", "L4"], "131.4 GiB of weights"),
        (["--model", "nobody"], "no shape is called"),
        (["--device", "H1000"], "H100"),
        (["--router", "round-robin"], "round_robin"),
        (["--instances", "0"], "instances must be at least 1"),
        (["--request-rate", "-1"], "above 0"),
        (["--dataset", "multi-turn"], "cannot tokenise"),
        (["--trace", "/nowhere.jsonl"], "cannot read"),
        (["--tp", "5"], "tp"),
    ],
)
def test_what_cannot_be_simulated_is_refused(words, says, capsys):
    assert main(["sim", *words]) in (1, 2)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, says",
    [
        ("--pages -4", "pages must be at least 0, got -4"),
        ("--page-size -1", "page_size must be at least 0"),
        ("--max-seqs 0", "max_seqs must be at least 1"),
        ("--budget 0", "budget must be at least 1"),
        ("--max-len -5", "max_len must be at least 0"),
        ("--max-queue -1", "max_queue must be at least 0"),
        ("--round-context -1", "round_context must be at least 0"),
        ("--instances 0", "instances must be at least 1"),
        ("--limit -2", "limit must be at least 0"),
        ("--percentiles 200", "a percentile must be in [0, 100]"),
        ("--num-prompts 0", "num_prompts must be at least 1"),
        ("--input-len 0", "input_len must be at least 1"),
        ("--output-len -3", "output_len must be at least 0"),
        ("--prefix-len -3", "prefix_len must be at least 0"),
        ("--request-rate -2", "request rate must be above 0"),
        ("--burstiness -1", "burstiness must be above 0"),
        ("--find rate --goodput ttft:5 --pages -4", "pages must be at least 0"),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(words, says, capsys):
    assert main(["sim", *words.split()]) == 2
    assert says in capsys.readouterr().err


def test_a_malformed_row_is_named_and_skipped_only_when_asked(tmp_path, trace, capsys):
    path = Path(trace)
    path.write_text(path.read_text() + '{"timestamp": 1, "input_length": -5, "output_length": 2}\n')
    assert main(["sim", "--trace", trace]) == 2
    assert "line 41" in capsys.readouterr().err
    found = sim(tmp_path, "--trace", trace, "--skip-bad")
    assert "1 malformed rows of the trace were left out" in capsys.readouterr().out
    assert found["workload"]["skipped"] == 1 and found["completed"] == 40


def test_overlap_is_the_engines_own_choice_unless_said(tmp_path, trace, capsys):
    words = ["--trace", trace, "--limit", "20"]
    ttft = {
        said: sim(tmp_path, *words, "--overlap", said)["mean_ttft_ms"]
        for said in ("auto", "on", "off")
    }
    assert ttft["auto"] == ttft["on"] != ttft["off"]
    assert overlaps(Fleet(device="H200")) and not overlaps(Fleet(device="CPU"))
    assert main(["sim", *words, "--overlap", "maybe"]) == 2
    assert "auto, on or off" in capsys.readouterr().err


def test_heads_that_stream_leave_room_and_cost_less(tmp_path, trace):
    """Three of four heads hold a window: pages for three times as many positions; cheaper steps."""
    rule = "duoattention:by=random,share=0.25,window=256"
    spec = find_spec("llama-3.1-8b")
    pages = [
        pages_by_formula(Fleet(device="H100", sparsity=said), spec, 16) for said in ("none", rule)
    ]
    assert pages[1] > 3 * pages[0]
    words = ["--trace", trace, "--model", "llama-3.1-8b", "--device", "H100", "--prefix", "none"]
    full, apart = sim(tmp_path, *words), sim(tmp_path, *words, "--sparsity", rule)
    assert full["completed"] == apart["completed"] == 40
    assert apart["total_output_tokens"] == full["total_output_tokens"]
    assert apart["mean_tpot_ms"] < full["mean_tpot_ms"]


def test_filtered_prompts_cost_a_share_of_the_layers(tmp_path, trace):
    """1200 tokens through 4 of 32 layers and 512 through all: the first token comes sooner."""
    words = ["--trace", trace, "--model", "llama-3.1-8b", "--device", "H100"]
    words += ["--prefix", "none"]
    full = sim(tmp_path, *words)
    some = sim(tmp_path, *words, "--sparsity", "gemfilter:budget=512,layer=3")
    every = sim(tmp_path, *words, "--sparsity", "gemfilter:budget=512,layer=31")
    ahead = sim(tmp_path, *words, "--sparsity", "gemfilter:budget=512,layer=3", "--overlap", "on")
    assert ahead["total_output_tokens"] == full["total_output_tokens"]
    assert some["completed"] == every["completed"] == 40
    assert some["total_output_tokens"] == full["total_output_tokens"]
    assert some["total_input_tokens"] == full["total_input_tokens"]
    assert some["mean_ttft_ms"] < 0.9 * full["mean_ttft_ms"]
    assert every["mean_ttft_ms"] > full["mean_ttft_ms"], "a filter of all layers is no gain"


@pytest.mark.parametrize(
    "words, says",
    [
        ("--speculate suffix", "simulated ones mean nothing"),
        ("--speculate drat --acceptance 0.5", "draft"),
        ("--acceptance 0.5", "acceptance is about drafts, and there are none"),
        ("--train-drafter on", "train_drafter is about drafts"),
        ("--speculate synthetic", "acceptance must be probabilities"),
        ("--speculate synthetic --acceptance 1.5", "acceptance must be probabilities"),
        ("--speculate synthetic --acceptance 0.5,x", "acceptance must be probabilities"),
        ("--speculate synthetic --acceptance 0.5 --draft-cost 0.1", "drafts at no cost"),
        ("--speculate synthetic --acceptance 0.5 --draft-length best", "unknown"),
        ("--speculate synthetic --acceptance 0.5 --draft-tokens 0", "draft_tokens must be at"),
        ("--speculate synthetic --acceptance 0.5 --subjects code", "say acceptance=measured"),
        ("--speculate synthetic --acceptance 0.5 --bounds", "bounds hold for one token a step"),
        ("--speculate synthetic --acceptance 0.5 --train-drafter on", "say acceptance=measured"),
        ("--speculate synthetic --acceptance measured --subjects spansh", "spanish"),
        ("--speculate synthetic --acceptance measured --subject-seconds 0", "above 0"),
        ("--speculate synthetic --acceptance measured --train-drafter of", "off"),
        (
            "--speculate synthetic --acceptance measured --train-drafter on --train-interval 0",
            "train_interval must be at least 1",
        ),
        (
            "--speculate synthetic --acceptance measured --train-drafter on --train-slowdown 0.5",
            "train_slowdown at least 1",
        ),
        ("--speculate draft --acceptance 0.5", "needs the price of a pass"),
        ("--speculate draft --acceptance 0.5 --draft-cost -1", "draft_cost must be at least 0"),
        ("--speculate draft --acceptance 0.5 --draft-model nobody", "no shape is called"),
        ("--speculate draft --acceptance 0.5 --draft-model qwen3-0.6b", "must share the model's"),
        ("--speculate draft --acceptance 0.5 --draft-model m --draft-cost 0.1", "either"),
        ("--speculate draft --acceptance 0.5 --draft-model m --cost fitted", "say draft_cost"),
    ],
)
def test_drafts_that_cannot_be_are_refused(words, says, capsys):
    assert main(["sim", *words.split()]) in (1, 2)
    assert says in capsys.readouterr().err


def test_drafts_are_told_and_take_memory(tmp_path, trace, capsys):
    words = ["--trace", trace, "--model", "llama-3.1-8b", "--device", "H100"]
    plain = sim(tmp_path, *words)
    drafts = ["--speculate", "draft", "--draft-model", "llama-3.2-1b", "--acceptance", "0.8,0.6"]
    drafts += ["--draft-length", "fixed", "--draft-tokens", "3"]
    capsys.readouterr()
    steps = tmp_path / "steps.json"
    found = sim(tmp_path, *words, *drafts, "--perfetto", str(steps))
    names = {event["name"] for event in json.loads(steps.read_text())["traceEvents"]}
    assert {"prefill", "verify"} <= names
    assert "of them accepted" in capsys.readouterr().out
    assert found["total_output_tokens"] == plain["total_output_tokens"]
    assert 0.3 < found["acceptance"] < 0.7 and "drafted_tokens" not in plain
    assert found["mean_tpot_ms"] < 0.8 * plain["mean_tpot_ms"]
    assert found["pages"] < 0.9 * plain["pages"]
    assert found["steps"] < plain["steps"]
