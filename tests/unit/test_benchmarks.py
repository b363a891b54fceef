"""The scripts of benchmarks/: they run, and the results page says what the files say."""

import json
import sys
from pathlib import Path

from kvarn.bench import record

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import pairs_page
import part_results
import proposers
import scheduler_overhead
import table

from kvarn.bench import part_results as shown
from kvarn.core.part import known


def test_scheduler_overhead_times_full_decode_steps():
    for prefix, windows in (("none", [None]), ("hash", [None, 32]), ("radix", [None])):
        times = scheduler_overhead.measure(4, 16, 20, 10, prefix, windows)
        assert len(times) == 10
        assert min(times) > 0


def test_results_page_shows_every_result():
    peers = record.header(
        "cpu_peers",
        {"threads": 2, "repeats": 3},
        {"kvarn": {"version": "1"}, "x": {"version": "2"}},
    ) | {
        "model_id": "m",
        "results": [
            {"workload": "W1", "engine": "kvarn", "tok_s": 50.0, "runs": []},
            {"workload": "W1", "engine": "x", "tok_s": 40.0, "runs": []},
        ],
    }
    steps = record.header(
        "scheduler_overhead", {"sequences": 4, "page_size": 16, "steps": 9}, {}
    ) | {"results": [{"workload": "hash", "median_ms": 0.5, "p90_ms": 1234.5, "p99_ms": None}]}
    page = table.page({"a.json": peers, "b.json": steps})
    assert "| W1 | 50 | 40 (1.25x) |" in page
    assert "kvarn 1, x 2" in page
    assert "| hash | 0.5 | 1234 | - |" in page
    assert "`a.json`" in page and "`b.json`" in page


def test_parts_show_what_the_results_say():
    files = sorted(table.RESULTS.glob("*.json"))
    rows = part_results.part_results({path.name: json.loads(path.read_text()) for path in files})
    assert json.loads(part_results.FILE.read_text()) == rows, "run benchmarks/table.py"
    keys = shown.results().keys()
    assert {("proposer", "suffix"), ("draft-length", "survival"), ("sparsity", "quest")} <= keys
    assert keys <= known().keys()


def test_the_page_of_pairs_says_what_is_tested():
    assert pairs_page.PAGE.read_text() == pairs_page.page(), "run benchmarks/pairs_page.py"


def test_proposers_are_timed():
    for proposer in ("ngram", "suffix, in Python"):
        row = proposers.measure(proposer, "edits", 600)
        assert min(row["draft_us"], row["read_us"]) > 0
