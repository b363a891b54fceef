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
import speculation_batches
import table

from kvarn.bench import part_results as shown
from kvarn.core.part import known
from kvarn.engine.llm import LLM


def test_scheduler_overhead_times_full_decode_steps():
    for prefix, windows in (("none", [None]), ("hash", [None, 32]), ("radix", [None])):
        times = scheduler_overhead.measure(4, 16, 20, 10, prefix, windows)
        assert len(times) == 10
        assert min(times) > 0


def test_every_kind_of_drafting_computes_its_prompts(tiny_folder, monkeypatch):
    """Who comes first must not pay for the prompts of the others."""
    monkeypatch.setattr(speculation_batches, "OUTPUT", 4)
    monkeypatch.setattr(
        speculation_batches, "made_up",
        lambda batch, turn: [[1 + (i + j + turn) % 90 for j in range(40)] for i in range(batch)],
    )  # fmt: skip
    llm = LLM(
        tiny_folder("llama"), load="random", max_seqs=4, speculate="synthetic",
        draft_length="fixed", synthetic_acceptance=0.7,
    )  # fmt: skip
    kinds = [speculation_batches.Kind("none", None), speculation_batches.kind("fixed", 0.7, 2)]
    found = list[int]()
    generate = llm.generate

    def watched(*asked):
        before = llm.engine.stats()
        done = generate(*asked)
        after = llm.engine.stats()
        found.append(after.prompt_tokens - before.prompt_tokens)
        found.append(after.cached_tokens - before.cached_tokens)
        return done

    monkeypatch.setattr(llm, "generate", watched)
    rows = speculation_batches.measure(llm, kinds, 3, speculation_batches.made_up, 1)
    assert [row["kind"] for row in rows] == ["none", "fixed 2, 0.7"]
    assert found == [120, 0] * 4
    llm.close()


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
