"""The mixed stream of `kvarn reproduce suffix-decoding`: its order, its counts, its tables."""

import sys
from pathlib import Path
from typing import Any

import pytest

from kvarn.bench import suffix_study
from kvarn.bench.experiments import find

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import speculation_sections


def test_what_comes_again_came_before() -> None:
    asked = suffix_study.stream()
    assert len(asked) == 4 * suffix_study.EACH == len(set(asked))
    for kind, prompt in asked:
        if kind == "again":
            assert asked.index(("talk", prompt)) < asked.index((kind, prompt))


def test_counts_are_those_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few short answers of the real model, plain, with suffix trees and with the drafter."""
    monkeypatch.setattr(suffix_study, "OUTPUT", 12)
    monkeypatch.setattr(suffix_study, "EACH", 1)
    some = {
        name: suffix_study.SETTINGS[name] for name in ("plain", "suffix tree, 8", "mix tree, 8")
    }
    monkeypatch.setattr(suffix_study, "SETTINGS", some)
    rows = suffix_study.mixed("smollm2-135m")
    assert [row["setting"] for row in rows if row["kind"] == "all"] == [*some]
    found: dict[Any, Any] = {(row["setting"], row["kind"]): row for row in rows}
    for (setting, kind), row in found.items():
        assert row["tokens"] == (44 if kind == "all" else 11)
        assert row["rounds"] + row["accepted"] == row["tokens"]
        assert (row["passes"] > 0) == (setting == "mix tree, 8" and row["drafted"] > 0)
        if setting == "plain":
            assert row["rounds"] == row["tokens"]
    assert found["suffix tree, 8", "again"]["rounds"] < 11  # the answer is in the tenant's tree
    said = suffix_study.mixed_lines(rows)
    assert len(said) == 2 + 3 and said[-1].startswith("mix tree, 8")
    page = speculation_sections.mixed(rows)
    assert any(line.startswith("| suffix tree, 8 |") for line in page)


def test_the_experiment_is_known_by_its_name() -> None:
    assert find("suffix-decoding").run is suffix_study.run
