"""`benchmarks/gpu/recorded_drafts.py`: the recording comes out, and drafts save steps."""

import sys
from contextlib import nullcontext
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import recorded_sections

from benchmarks.gpu import recorded_drafts as recorded
from kvarn.engine.llm import LLM
from kvarn.runner.inflight import InFlight

CHANCE = Random(0)
TEXT, OTHER = ([CHANCE.randrange(97) for _ in range(60)] for _ in range(2))
REPEATS = recorded.Turn(TEXT, TEXT[:40])
FRESH = recorded.Turn(TEXT[::-1], OTHER[:40])
SETTINGS = (("suffix", "ngram"), (7,))


@pytest.fixture(scope="module")
def engine(tiny_folder):
    llm = LLM(tiny_folder("llama"), load="random", max_seqs=2, speculate="suffix", draft_tokens=7)
    yield llm.engine
    llm.close()


def test_drafts_save_steps_where_the_recording_repeats(engine):
    for groups, factor in (([[REPEATS]], 3), ([[FRESH]], 1), ([[REPEATS, FRESH]], 1)):
        rows = recorded.measure(engine, recorded.settings(*SETTINGS), groups, 1)
        steps = {(row["proposer"], row["setting"]): row["steps"] for row in rows}
        plain = steps["", "plain"]
        assert plain >= 40
        assert factor * steps["suffix", "fixed 7"] <= plain + 2
        assert factor * steps["ngram", "fixed 7"] <= plain + 2
        assert all(row["output_tokens"] == 40 * len(groups[0]) for row in rows)
        assert rows[0]["ratio"] == rows[0]["tokens_per_round"] == 1.0


def test_no_run_knows_what_the_one_before_it_said(engine):
    chosen = recorded.settings(("suffix",), (7,))
    rows = recorded.measure(engine, chosen, [[FRESH]], 3)
    assert rows[1]["tokens_per_round"] < 1.5, "a draft came from an earlier run"
    rows = recorded.measure(engine, chosen, [[FRESH], [FRESH]], 3)
    assert rows[1]["tokens_per_round"] > 1.5, "none came from this one"


def test_what_differs_from_the_recording_is_an_error(engine, monkeypatch):
    settle = InFlight.settle
    monkeypatch.setattr(recorded, "teaching", nullcontext)
    monkeypatch.setattr(engine, "speculation", None)
    with pytest.raises(AssertionError, match="recorded"):
        recorded.serve(engine, [FRESH])
    assert InFlight.settle is settle


def test_the_trace_holds_what_agents_said():
    agents = recorded.load(recorded.TRACE)
    assert len(agents) >= 32
    found = recorded.statistics(agents)
    assert min(found["repeated"]) > 0.7
    groups = recorded.groups_of(agents, 32, 3)
    assert [len(group) for group in groups] == [32] * recorded.TURNS
    assert len(recorded.groups_of(agents, 1, 3)) == 3 * recorded.TURNS


def test_the_section_shows_every_setting(engine):
    rows = recorded.measure(engine, recorded.settings(*SETTINGS), [[REPEATS]], 1)
    result = {
        "config": {"model": "tiny"},
        "workload": {"turns": 2, "agents_alone": 1, "statistics": recorded.statistics([[REPEATS]])},
        "results": [{"batch": batch} | row for batch in (1, 32) for row in rows],
        "matching": [
            {"text": "edits", "history": n, "draft_us": 5.0, "draft_p95_us": 6.0} for n in (8, 9)
        ],
    }
    page = "\n".join(recorded_sections.recorded_drafts(result))
    assert "| suffix, fixed 7 |" in page and "| ngram, survival |" in page
    assert "| edits | 5 | 5 |" in page
