"""The modelled comparison of length controls: the same every time, and where each is at home."""

import pytest

from kvarn.bench.experiments import find
from kvarn.bench.modelled_lengths import MACHINES, TEXTS, run, table_of
from kvarn.core.errors import ConfigError


def test_controls_where_they_are_at_home() -> None:
    result = run("modelled")
    again = run("modelled")
    assert result["results"] == again["results"]
    _, rows = table_of(result)
    assert len(rows) == len(MACHINES) * len(TEXTS)
    found = dict(rows)
    best, _, specdec, _, _ = found["dense, costly drafts; by token"]
    assert specdec > best > 1
    for text in ("poor", "by passage"):
        _, worst, _, utility, _ = found[f"experts, free drafts; {text}"]
        assert worst < 0.8 and utility > 0.9


def test_it_runs_no_model() -> None:
    experiment = find("draft-lengths")
    assert experiment.lines(experiment.run(experiment.model))
    with pytest.raises(ConfigError, match="no model"):
        experiment.run("smollm2-135m")
